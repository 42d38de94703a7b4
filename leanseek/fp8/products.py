"""The product of two FP8 operands: partial sums of 128 along K, scaled and added in float32 (3.3.2)."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from leanseek import ops
from leanseek.ops import Groups
from leanseek.ops.formats import TILE
from leanseek.ops.quantize import Coded, Operand, take

Cuts = list[int]  # where K is cut: a scale is that of a whole piece


def cuts(length: int, halves: int = 1) -> Cuts:
    """Pieces of 128 of each of `halves` equal parts of a side."""
    part = length // halves
    return [0, *(half * part + min(start + TILE, part) for half in range(halves) for start in range(0, part, TILE))]


def product(a: Operand, b: Operand, k_cuts: Cuts, dtype: torch.dtype) -> Tensor:
    """a [M, K] · b [N, K]ᵀ -> [M, N], rounded once, to `dtype`."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        out = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
        return ops.grouped_product(a, b[None], [a.shape[0]], out)
    if isinstance(a, Coded) and isinstance(b, Coded):
        return exact_product(a, b, k_cuts).to(dtype)
    return _gpu().product(a, b, dtype)


def exact_product(a: Coded, b: Coded, k_cuts: Cuts) -> Tensor:
    """What an FP8 tensor core with promotion computes, [M, N] float32: a piece's codes are multiplied and summed in
    float32, the sum is scaled by sa · sb and added to the total."""
    total = torch.zeros(a.codes.shape[0], b.codes.shape[0], device=a.codes.device)
    for start, stop in pairwise(k_cuts):
        partial = a.codes[:, start:stop] @ b.codes[:, start:stop].t()
        total += partial * (a.scale[:, start, None] * b.scale[:, start])
    return total


def grouped_product(a: Operand, b: Operand, groups: Groups, k_cuts: Cuts, dtype: torch.dtype) -> Tensor:
    """Each group's rows of a [M, K] times its b [G, N, K]ᵀ -> [M, N]."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
        return ops.grouped_product(a, b, groups.ends, out)
    if isinstance(a, Coded) and isinstance(b, Coded):
        parts = pairwise([0, *groups.ends])
        return torch.cat([product(take(a, slice(*rows)), take(b, e), k_cuts, dtype) for e, rows in enumerate(parts)])
    if groups.tiles is None:
        return _gpu().product(a, take(b, 0), dtype)
    return _gpu().grouped_product(a, b, groups.tiles, dtype)


def grouped_gradient(a: Operand, b: Operand, groups: Groups, dtype: torch.dtype) -> Tensor:
    """aᵀ · b over each group's own rows of a [M, N], b [M, K] (turned) -> [G, N, K]; zero where there are none."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        out = torch.empty(len(groups.ends), a.shape[1], b.shape[1], dtype=dtype, device=a.device)
        return ops.grouped_gradient(a, b, groups.ends, out)
    if isinstance(a, Coded) and isinstance(b, Coded):
        edges, found = groups.bands.tolist(), []
        for start, stop in pairwise([0, *groups.ends]):
            inner = [edge - start for edge in edges if start <= edge <= stop]
            rows = slice(start, stop)
            found.append(product(a.take(rows).t(), b.take(rows).t(), inner, dtype))
        return torch.stack(found)
    if groups.tiles is None:
        return _gpu().product(a, b, dtype)[None]
    return _gpu().grouped_weight_gradient(a, b, groups.tiles, dtype)


def _gpu() -> ModuleType:
    from leanseek.gpu import paths

    return paths
