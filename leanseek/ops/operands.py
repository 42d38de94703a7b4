"""What FP8 products multiply, and what is kept of an activation for backward.

An operand of the compute type is a tensor that holds q · scale; `Coded` is one of the exact arithmetic, `Codes` and
`Blocks` are a GPU's. All of them know the two methods of a tensor that layers use: `index_select` of activations,
`transpose` of weights. Which product runs is decided by their types (grouped.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from leanseek.ops.formats import TILE, spread

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Coded:
    """An operand of the exact arithmetic: codes and the scale of each."""

    codes: Tensor  # [rows, columns] float32, on the grid of E4M3; weights have a dimension of experts before
    scale: Tensor  # of the same shape, float32
    cuts: tuple[int, ...] = ()  # where rows of activations are cut: within a piece a row has one scale

    def view(self, *shape: int) -> Coded:
        return Coded(self.codes.view(shape), self.scale.view(shape))

    def transpose(self, a: int, b: int) -> Coded:
        return Coded(self.codes.transpose(a, b), self.scale.transpose(a, b))

    def index_select(self, dim: int, rows: Tensor) -> Coded:
        return Coded(self.codes.index_select(dim, rows), self.scale.index_select(dim, rows), self.cuts)


class Codes(NamedTuple):
    """x = codes · scales, E4M3 and float32: of rows, codes [M, K] with scales [M, ceil(K / 128)] that lie by columns;
    or of weights, [.., N, K] with scales [.., ceil(N / 128), ceil(K / 128)] that lie by rows."""

    codes: Tensor
    scales: Tensor

    def index_select(self, dim: int, rows: Tensor) -> Codes:
        """Rows (dim 0) by index: in another order, or several times."""
        found = new_codes(rows.numel(), self.codes.shape[1], self.codes.device)
        wide = torch.int64 if self.codes.shape[1] % 8 == 0 else torch.uint8  # copied 8 codes at a time
        torch.index_select(self.codes.view(wide), 0, rows, out=found.codes.view(wide))
        torch.index_select(self.scales.t(), 1, rows, out=found.scales.t())
        return found


class Blocks(NamedTuple):
    """Weights in 128×128 blocks: codes [.., N, K], scales [.., ceil(N / 128), ceil(K / 128)] float32; and the same
    turned, [.., K, N], because FP8 products read both operands along the side that is summed."""

    codes: Tensor
    scales: Tensor
    codes_t: Tensor
    scales_t: Tensor

    def transpose(self, a: int, b: int) -> Blocks:
        return Blocks(self.codes_t, self.scales_t, self.codes, self.scales)


Activation: TypeAlias = Tensor | Coded | Codes
Weight: TypeAlias = Tensor | Coded | Blocks


class Kept(NamedTuple):
    """An activation as backward finds it: one byte a value."""

    codes: Tensor  # [rows, columns] E4M3
    scales: Tensor  # [rows, ceil(columns / 128)] float32

    def wide(self) -> Tensor:
        """[rows, columns] float32"""
        return self.codes.float() * spread(self.scales, (1, TILE), self.codes.shape)


def new_codes(rows: int, columns: int, device: torch.device) -> Codes:
    """Room for codes and their scales; a column of scales starts at a multiple of 16 bytes."""
    scales = torch.empty(-(-columns // TILE), -(-rows // 4) * 4, dtype=torch.float32, device=device)
    return Codes(torch.empty(rows, columns, dtype=FP8, device=device), scales[:, :rows].t())


def cuts(length: int, halves: int = 1) -> tuple[int, ...]:
    """Pieces of 128 of each of `halves` equal parts of a side."""
    part = length // halves
    return 0, *(half * part + min(start + TILE, part) for half in range(halves) for start in range(0, part, TILE))


def exact_product(a: Coded, b: Coded) -> Tensor:
    """a [M, K] · b [N, K]ᵀ as an FP8 tensor core with promotion computes it, float32: a piece's codes are multiplied
    and summed in float32, the sum is scaled by sa · sb and added to the total (3.3.2)."""
    total = torch.zeros(a.codes.shape[0], b.codes.shape[0], device=a.codes.device)
    for start, stop in pairwise(a.cuts):
        partial = a.codes[:, start:stop] @ b.codes[:, start:stop].t()
        total += partial * (a.scale[:, start, None] * b.scale[:, start])
    return total
