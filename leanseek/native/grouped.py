"""Products of rows in groups and the sum over a token's rows: what the routed experts of a training step are made of.

Products are rounded once, also to float32 (grouped.cpp): torch.mm would round to BF16 first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek import ops
from leanseek.native.library import DTYPES, accepts, implements, kernel, pointers
from leanseek.ops.dispatch import Rows
from leanseek.ops.experts import combine_rows
from leanseek.ops.grouped import Groups

_product = kernel("grouped_product", "nnn pp pnp pn p")
_gradient = kernel("grouped_gradient", "nn pp pppp")
_combine = kernel("combine_rows", "n pn p nnn p")


def _first(groups: Groups) -> Tensor:
    return torch.tensor([0, *groups.ends])


def _takes_product(a: Tensor, b: Tensor, groups: Groups, dtype: torch.dtype, index: Tensor | None = None) -> bool:
    if not isinstance(a, Tensor):
        return False
    stored = b if b.is_contiguous() else b.transpose(1, 2)
    return accepts(a, stored) and stored.is_contiguous() and (dtype == torch.float32 or dtype == a.dtype)


@implements(ops.grouped_product, _takes_product)
def grouped_product(a: Tensor, b: Tensor, groups: Groups, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    across, first, shape = int(not b.is_contiguous()), _first(groups), torch.tensor(b.shape)
    out = torch.empty(groups.rows, b.shape[1], dtype=dtype)
    _product(
        DTYPES[a.dtype], DTYPES[b.dtype], DTYPES[dtype], *pointers(shape, first, a), a.stride(0), *pointers(index, b),
        across, out.data_ptr(),
    )  # fmt: skip
    return out


def _takes_gradient(a: Tensor, b: Tensor, groups: Groups, dtype: torch.dtype, index: Tensor | None = None) -> bool:
    return isinstance(a, Tensor) and accepts(a, b) and dtype in DTYPES and a.dtype == b.dtype and a.is_contiguous()


@implements(ops.grouped_gradient, _takes_gradient)
def grouped_gradient(a: Tensor, b: Tensor, groups: Groups, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    out = torch.empty(len(groups.ends), a.shape[1], b.shape[1], dtype=dtype)
    first, shape = _first(groups), torch.tensor(out.shape)
    b = b.contiguous()  # rows that came from other ranks lie between other things
    _gradient(DTYPES[a.dtype], DTYPES[dtype], *pointers(shape, first, a, b, index, out))
    return out


@implements(combine_rows, lambda rows, *_: accepts(rows) and rows.stride(1) == 1, Rows.BOTH)
def combined(rows: Tensor, place: Tensor, tokens: int) -> Tensor:
    d = rows.shape[1]
    out = torch.empty(tokens, d, dtype=rows.dtype)
    k = place.numel() // max(1, tokens)
    _combine(
        DTYPES[rows.dtype], rows.data_ptr(), rows.stride(0), place.data_ptr(), tokens, k, d, out.data_ptr()
    )  # fmt: skip
    return out
