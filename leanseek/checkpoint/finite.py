"""Finds weights that are NaN or infinite, by name, when a checkpoint is converted, exported or examined."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from leanseek.checkpoint.files import CHUNK, CheckpointError, Lazy, Stored
from leanseek.reading import shorten

_NAMED = 3  # tensors named in a message


def nonfinite(tensor: Tensor) -> int:
    """Number of NaN or infinite values; for FP8 and E8M0 scales, of codes that mean NaN or infinity."""
    if not tensor.dtype.is_floating_point:
        return 0
    flat, count = tensor.detach().reshape(-1), 0
    for first in range(0, flat.numel(), CHUNK):
        part = flat[first : first + CHUNK]
        if part.dtype.itemsize == 1:
            part = part.float()
        if not bool(
            part.sum(dtype=torch.float32).isfinite()
        ):  # a quick test first: large finite values may add up to infinity
            count += int((~part.isfinite()).sum())
    return count


class Census:
    """Counts the non-finite values of the tensors that pass through it, by name."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def watched(self, lazy: Lazy) -> Lazy:
        """The tensor, checked when it is made."""
        return lazy._replace(make=functools.partial(self._counted, lazy))

    def count(self, stored: Mapping[str, Stored]) -> dict[str, int]:
        """Read all tensors, one at a time; returns the counts of those with non-finite values."""
        for name, one in stored.items():
            self._note(name, one.read())
        return self.found

    def judge(self, allow: bool) -> None:
        """Report non-finite values: a warning if `allow`, else an error.

        Raises:
            CheckpointError: there are some, and `allow` is not set.
        """
        if not self.found:
            return
        if not allow:
            raise CheckpointError(f"{self}; nothing is written (--allow-nonfinite writes them)")
        warnings.warn(str(self), stacklevel=3)

    def __str__(self) -> str:
        listed = [f"{shorten(name, 200)} ({count:,})" for name, count in sorted(self.found.items())]
        more = f" and {len(listed) - _NAMED:,} more" if len(listed) > _NAMED else ""
        return f"weights hold NaN or infinity: {', '.join(listed[:_NAMED])}{more}"

    def _counted(self, lazy: Lazy) -> Tensor:
        tensor = lazy.make()
        self._note(lazy.name, tensor)
        return tensor

    def _note(self, name: str, tensor: Tensor) -> None:
        if count := nonfinite(tensor):
            self.found[name] = count
