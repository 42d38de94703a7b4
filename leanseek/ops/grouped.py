"""Products of rows in groups, each group with a matrix of its own: what the experts of a layer multiply (2.1.2)."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leanseek.ops.dispatch import pick
from leanseek.ops.products import multiply

if TYPE_CHECKING:
    from leanseek.ops.triton.tiles import Tiles

BAND = 128  # rows that share a scale in FP8's weight gradients, at most (3.3.2)


class Groups:
    """Which of M rows, sorted by group, belong to which. A path asks for the form that it reads; only `ends` and
    `bands` wait for a GPU."""

    def __init__(self, rows: int, device: torch.device, ends: Tensor | None = None):
        """ends [G] int32: where each group's rows end; None for one group of all rows."""
        self.rows, self._device, self._ends = rows, device, ends

    @cached_property
    def ends(self) -> list[int]:
        return [self.rows] if self._ends is None else self._ends.tolist()

    @cached_property
    def bands(self) -> Tensor:
        """[n + 1] int64: cuts the rows into runs of at most 128, none of which crosses a group's end."""
        cuts, start = [0], 0
        for end in self.ends:
            cuts += [*range(start + BAND, end, BAND), end] if end > start else []
            start = end
        return torch.tensor(cuts, device=self._device)

    @cached_property
    def tiles(self) -> Tiles | None:
        """The same cuts as a table on the device; None for one group."""
        from leanseek.ops.triton.tiles import group_tiles

        return None if self._ends is None else group_tiles(self._ends, self.rows)


def grouped_product(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    """Rows of a [M, K] up to each of `ends` times that group's b [G, N, K]ᵀ -> out [M, N], rounded once to its dtype.

    b may be a transposed view. Sums are float32.
    """
    return pick("grouped_product", _product, a, b, out)(a, b, ends, out)


def grouped_gradient(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    """aᵀ · b over each group's own rows of a [M, N] and b [M, K] -> out [G, N, K]; zero where there are none."""
    return pick("grouped_gradient", _gradient, a, b, out)(a, b, ends, out)


def _product(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    for group, (start, stop) in enumerate(pairwise([0, *ends])):
        if stop > start:
            multiply(a[start:stop], b[group].t(), out[start:stop])
    return out


def _gradient(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    for group, (start, stop) in enumerate(pairwise([0, *ends])):
        if stop > start:
            multiply(a[start:stop].t(), b[start:stop], out[group])
        else:
            out[group].zero_()
    return out
