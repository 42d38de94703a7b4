"""Products of rows in groups, each group with a matrix of its own: what the experts of a layer multiply (2.1.2)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from leanseek.ops.dispatch import pick


def grouped_product(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    """Rows of a [M, K] up to each of `ends` times that group's b [G, N, K]ᵀ -> out [M, N], rounded once to its dtype.

    b may be a transposed view. Sums are float32.
    """
    return pick("grouped_product", _product, a, b, out)(a, b, ends, out)


def grouped_gradient(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    """aᵀ · b over each group's own rows of a [M, N] and b [M, K] -> out [G, N, K]; zero where there are none."""
    return pick("grouped_gradient", _gradient, a, b, out)(a, b, ends, out)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _product(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    for group, (start, stop) in enumerate(pairwise([0, *ends])):
        if stop > start:
            _multiply(a[start:stop], b[group].t(), out[start:stop])
    return out


def _gradient(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    for group, (start, stop) in enumerate(pairwise([0, *ends])):
        if stop > start:
            _multiply(a[start:stop].t(), b[start:stop], out[group])
        else:
            out[group].zero_()
    return out
