"""The product of two FP8 operands: partial sums of 128 along K, scaled and added in float32 (3.3.2)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from leanseek import ops
from leanseek.fp8.formats import TILE
from leanseek.fp8.quantize import Coded, Operand, take

Cuts = list[int]  # where K is cut: a scale is that of a whole piece


def cuts(length: int, halves: int = 1) -> Cuts:
    """Pieces of 128 of each of `halves` equal parts of a side."""
    part = length // halves
    return [0, *(half * part + min(start + TILE, part) for half in range(halves) for start in range(0, part, TILE))]


def product(a: Operand, b: Operand, k_cuts: Cuts, out: Tensor) -> Tensor:
    """a [M, K] · b [N, K]ᵀ into out [M, N], rounded once, to out's dtype."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return ops.grouped_product(a, b[None], [a.shape[0]], out)
    assert isinstance(a, Coded) and isinstance(b, Coded)
    return out.copy_(exact_product(a, b, k_cuts))


def exact_product(a: Coded, b: Coded, k_cuts: Cuts) -> Tensor:
    """What an FP8 tensor core with promotion computes, [M, N] float32: a piece's codes are multiplied and summed in
    float32, the sum is scaled by sa · sb and added to the total."""
    total = torch.zeros(a.codes.shape[0], b.codes.shape[0], device=a.codes.device)
    for start, stop in pairwise(k_cuts):
        partial = a.codes[:, start:stop] @ b.codes[:, start:stop].t()
        total += partial * (a.scale[:, start, None] * b.scale[:, start])
    return total


def grouped_product(a: Operand, b: Operand, ends: list[int], k_cuts: Cuts, out: Tensor) -> Tensor:
    """Rows of a [M, K] up to each of `ends` times that expert's b [E, N, K]ᵀ -> out [M, N]."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return ops.grouped_product(a, b, ends, out)
    for expert, (start, stop) in enumerate(pairwise([0, *ends])):
        if stop > start:
            product(take(a, slice(start, stop)), take(b, expert), k_cuts, out[start:stop])
    return out


def grouped_gradient(a: Operand, b: Operand, ends: list[int], bands: Tensor, out: Tensor) -> Tensor:
    """aᵀ · b over each expert's own rows of a [M, N], b [M, K] (turned) -> out [E, N, K]; zero where there are none."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return ops.grouped_gradient(a, b, ends, out)
    edges = bands.tolist()
    for expert, (start, stop) in enumerate(pairwise([0, *ends])):
        if stop == start:
            out[expert].zero_()
            continue
        rows = slice(start, stop)
        inner = [edge - start for edge in edges if start <= edge <= stop]
        product(take(a, rows).t(), take(b, rows).t(), inner, out[expert])
    return out
