"""Several samples in a row of a batch: which position is whose.

`Lengths` are the samples' lengths in each row, in order; what is left of a row is padding. Samples do not see each
other: attention runs by sample, positions restart, and no prediction reaches into the next.

`Shared` samples have rows in common: what several begin with, a layer computes once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.model.moe import Route

Lengths = Sequence[Sequence[int]]


class Shared(NamedTuple):
    """S samples of at most T tokens, made of N rows: a layer takes x [1, N, ...]."""

    rows: Tensor  # [S, T] int64, the row of each token; behind a sample's end any, which none of its tokens sees
    place: Tensor  # [N] int64, the first token of each row, as a number in S·T
    more: Tensor  # [M] int64, the other tokens of rows that have several
    several: Tensor  # [R] int64, those rows
    which: Tensor  # [M] int64, the place in `several` of each of `more`

    @classmethod
    def of(cls, samples: Sequence[Sequence[int]], device: torch.device) -> Shared:
        """samples: the rows of each, numbered as they first occur."""
        width = max(map(len, samples))
        place: list[int] = []
        more: list[int] = []
        again: dict[int, int] = {}
        which: list[int] = []
        for sample, rows in enumerate(samples):
            for token, row in enumerate(rows, start=sample * width):
                if row == len(place):
                    place.append(token)
                else:
                    more.append(token)
                    which.append(again.setdefault(row, len(again)))
        padded = [[*rows, *[0] * (width - len(rows))] for rows in samples]
        lists = (padded, place, more, list(again), which)
        return cls(*(torch.tensor(each, dtype=torch.int64, device=device) for each in lists))

    def attend(self, attend: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`attend` over inputs [1, N, ...] as samples [S, T, ...] -> [1, N, ...]."""
        out = attend(*(_Spread.apply(x[0], *self) for x in inputs))
        return out.flatten(0, 1).index_select(0, self.place)[None]


class _Spread(torch.autograd.Function):
    """x [N, ...] -> [S, T, ...] by `Shared`. A row's gradient is the sum over its tokens, in float32 and in order."""

    @staticmethod
    def forward(ctx, x, rows, *tokens):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*tokens)
        return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        place, more, several, which = ctx.saved_tensors
        grad = grad.flatten(0, 1)
        found = grad.index_select(0, place)
        if len(several):
            sums = found[several].float().index_put_((which,), grad[more].float(), accumulate=True)
            found[several] = sums.to(found.dtype)
        return found, None, None, None, None, None


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
