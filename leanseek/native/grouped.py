"""Grouped BF16 products (grouped.cpp), rounded once, also to float32: torch.mm would round to BF16 first."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek import ops
from leanseek.native.library import DTYPES, accepts, implements, kernel

_product = kernel("grouped_product", "nn pp pn pn p")
_gradient = kernel("grouped_gradient", "n pp ppp")


def _first(ends: list[int]) -> Tensor:
    return torch.tensor([0, *ends])


def _takes_product(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> bool:
    stored = b if b.is_contiguous() else b.transpose(1, 2)
    return accepts(a, stored, out) and a.dtype == torch.bfloat16 and stored.is_contiguous() and out.is_contiguous()


@implements(ops.grouped_product, _takes_product)
def grouped_product(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    across, first = int(not b.is_contiguous()), _first(ends)
    shape = torch.tensor(b.shape)
    _product(
        DTYPES[b.dtype], DTYPES[out.dtype], shape.data_ptr(), first.data_ptr(), a.data_ptr(), a.stride(0),
        b.data_ptr(), across, out.data_ptr(),
    )  # fmt: skip
    return out


def _takes_gradient(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> bool:
    return accepts(a, b, out) and a.dtype == b.dtype == torch.bfloat16 and all(t.is_contiguous() for t in (a, b, out))


@implements(ops.grouped_gradient, _takes_gradient)
def grouped_gradient(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    first, shape = _first(ends), torch.tensor(out.shape)
    _gradient(DTYPES[out.dtype], shape.data_ptr(), first.data_ptr(), a.data_ptr(), b.data_ptr(), out.data_ptr())
    return out
