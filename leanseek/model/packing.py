"""Several samples in a row of a batch: which position is whose.

`Lengths` are the samples' lengths in each row, in order; what is left of a row is padding. Samples do not see each
other: attention runs by sample, positions restart, and no prediction reaches into the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leanseek.model.moe import Route

Lengths = Sequence[Sequence[int]]


def positions(lengths: Lengths | None, x: Tensor) -> Tensor:
    """Each position of x [B, T, ...] in its sample, [B, T] int64; without lengths [1, T]."""
    size = x.shape[1]
    if lengths is None:
        return torch.arange(size, device=x.device)[None]
    return torch.stack([_by_row(row, size, lambda n: torch.arange(n)) for row in lengths]).to(x.device)


def within(lengths: Lengths | None, values: Tensor, ahead: int) -> Tensor:
    """values [B, T], which belong to the tokens `ahead` of each position; 0 where that is past the sample's end."""
    if lengths is None:
        return values
    size = values.shape[1]
    left = torch.stack([_by_row(row, size, lambda n: torch.arange(n, 0, -1)) for row in lengths])
    return values.masked_fill((left <= ahead).to(values.device), 0)


def _by_row(samples: Sequence[int], size: int, of: Callable[[int], Tensor]) -> Tensor:
    """`of` each sample's length, then zeros."""
    return torch.cat([*map(of, samples), torch.zeros(size - sum(samples), dtype=torch.int64)])


def without_padding(routes: list[Route], lengths: Lengths) -> list[Route]:
    """The routes of the tokens of samples."""
    if not routes:
        return routes
    size = routes[0].indices.shape[0] // len(lengths)
    if all(sum(row) == size for row in lengths):
        return routes
    kept = torch.cat([torch.arange(sum(row)) + i * size for i, row in enumerate(lengths)]).to(routes[0].indices.device)
    return [Route(r.layer, r.indices[kept], r.weights[kept], r.scores.index_select(0, kept)) for r in routes]


def membership(lengths: Lengths, device: torch.device) -> Tensor:
    """[S, N] float32: 1 where a token, padding left out, belongs to a sample."""
    sizes = torch.tensor([n for row in lengths for n in row])
    return torch.eye(len(sizes)).repeat_interleave(sizes, dim=1).to(device)
