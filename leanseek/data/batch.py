"""What a training step takes: rows of tokens, and what its objective needs to know of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of a step: all of them, a rank's, or a micro-batch's."""

    tokens: Tensor  # [B, T + lookahead] int64: inputs, and the targets behind them
    sequences: int  # rows of the whole step, all ranks'; 0: others have a micro-batch more, this one only keeps pace
    lengths: tuple[tuple[int, ...], ...] | None = None  # of the samples in each row; the rest of T is padding.
    # None: a row is one sample
    weights: Tensor | None = None  # [B, T + lookahead] float32: each token's part of the step's loss, as a target.
    # They hold the denominators of the whole step, so a loss is a sum and any split gives the same gradient.
    # None: the mean over all targets
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # what else an objective reads, by name: [B, ...] each

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def share(self) -> float:
        """What part of the step's rows these are."""
        return len(self) / self.sequences if self.sequences else 0.0

    def to(self, device: torch.device | str) -> Batch:
        return dataclasses.replace(
            self,
            tokens=self.tokens.to(device),
            weights=None if self.weights is None else self.weights.to(device),
            columns={name: column.to(device) for name, column in self.columns.items()},
        )

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start to stop (exclusive)."""
        return dataclasses.replace(
            self,
            tokens=self.tokens[start:stop],
            lengths=None if self.lengths is None else self.lengths[start:stop],
            weights=None if self.weights is None else self.weights[start:stop],
            columns={name: column[start:stop] for name, column in self.columns.items()},
        )

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of `size` rows (0: one of all), the last perhaps smaller."""
        size = size or len(self)
        return [self.rows(first, first + size) for first in range(0, len(self), size)]

    def idle(self) -> Batch:
        """A micro-batch that adds nothing to the step."""
        first = self.rows(0, 1)
        weights = None if first.weights is None else torch.zeros_like(first.weights)
        return dataclasses.replace(first, sequences=0, weights=weights)
