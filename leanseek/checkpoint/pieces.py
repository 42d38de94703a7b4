"""Tensors of a whole network of which every rank, and every file, holds one contiguous flat range.

That is all there is to a layout: experts 8 to 15 of a stack, rows of a matrix, a slice of the moments across parameters
are ranges, and a stage of the pipeline holds some tensors whole and others not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.checkpoint.files import CheckpointError, Stored
from leanseek.reading import shorten


class Piece(NamedTuple):
    """What a rank holds of a tensor."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # place of our first value in the flat whole tensor
    tensor: Tensor  # the values, in any shape


class Spread(NamedTuple):
    """A whole tensor in files: they hold its ranges, which tile it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[tuple[int, Stored]]  # each with the place of its first value

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Values `start` to `stop` of the flat tensor, [stop - start]; the whole in its shape by default."""
        stop = math.prod(self.shape) if stop is None else stop
        out = self.copy_to(torch.empty(stop - start, dtype=self.dtype), start)
        return out.view(self.shape) if stop - start == math.prod(self.shape) else out

    def copy_to(self, out: Tensor, start: int = 0) -> Tensor:
        """Fill contiguous `out` with the values from `start` on, converted to its dtype and device."""
        flat = out.view(-1)
        stop = start + flat.numel()
        for at, stored in self.parts:
            first, last = max(start, at), min(stop, at + math.prod(stored.shape))
            if first < last:
                stored.flat(first - at, last - at).copy_to(flat[first - start : last - start])
        return out


def pieces_of(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Tensors that this rank holds whole."""
    return [Piece(name, tuple(tensor.shape), 0, tensor) for name, tensor in tensors.items()]


def check_tiling(name: str, size: int, ranges: Iterable[tuple[int, int, str]], nowhere: str) -> None:
    """Check that the ranges (first value, number of values, where) hold each of a tensor's `size` values once.

    nowhere: "in no file", or what else is wrong with a missing value

    Raises:
        CheckpointError: some are missing or there twice.
    """
    at, before = 0, ""
    for start, count, who in sorted((r for r in ranges if r[1]), key=itemgetter(0)):
        if start > at:
            break
        if start < at:
            raise CheckpointError(f"{shorten(name, 200)}: value {start} is {before} and {who}")
        at, before = start + count, who
    if at != size:
        raise CheckpointError(f"{shorten(name, 200)}: value {at} of {size} is {nowhere}")
