"""Products of rows in groups, each group with a matrix of its own: what the experts of a layer multiply (2.1.2)."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.ops.dispatch import Priority, op
from leanseek.ops.formats import TILE
from leanseek.ops.operands import Activation, Coded, Weight, exact_product
from leanseek.ops.products import multiply


class Tiles(NamedTuple):
    """Tile t holds rows start[t] to stop[t] of expert[t]; expert e has tiles first[e] to first[e + 1].

    There are as many places for tiles as any routing of these rows can need, so that nothing waits for the GPU; places
    that are not needed hold no rows.
    """

    expert: Tensor  # [T] int32
    start: Tensor  # [T] int32
    stop: Tensor  # [T] int32
    first: Tensor  # [E + 1] int32


def group_tiles(ends: Tensor, rows: int, size: int = TILE) -> Tiles:
    """ends [E] int32: where each expert's rows end; any count, also none. Rows past the last end belong to nobody.

    size: rows of a tile, at most.
    """
    n_experts = ends.numel()
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    first = torch.zeros(n_experts + 1, dtype=torch.int32, device=ends.device)
    first[1:] = ((ends - begins + size - 1) // size).cumsum(0)
    tile = torch.arange(rows // size + n_experts, dtype=torch.int32, device=ends.device)
    expert = torch.searchsorted(first[1:], tile, right=True, out_int32=True)
    used = expert < n_experts
    expert = expert.clamp(max=n_experts - 1)
    start = begins[expert] + (tile - first[expert]) * size
    stop = torch.minimum(start + size, ends[expert])
    return Tiles(expert, torch.where(used, start, 0).int(), torch.where(used, stop, 0).int(), first)


class Groups:
    """Which of M rows, sorted by group, belong to which. A path asks for the form that it reads; only `ends` and
    `bands` wait for a GPU."""

    def __init__(self, rows: int, device: torch.device, ends: Tensor | None = None):
        """ends [G] int32: where each group's rows end; None for one group of all rows."""
        self.rows, self._device, self.offsets = rows, device, ends

    @cached_property
    def ends(self) -> list[int]:
        return [self.rows] if self.offsets is None else self.offsets.tolist()

    @cached_property
    def bands(self) -> Tensor:
        """[n + 1] int64: cuts the rows into runs of at most 128, none of which crosses a group's end."""
        cuts, start = [0], 0
        for end in self.ends:
            cuts += [*range(start + TILE, end, TILE), end] if end > start else []
            start = end
        return torch.tensor(cuts, device=self._device)

    @cached_property
    def tiles(self) -> Tiles | None:
        """The same cuts as a table on the device; None for one group."""
        return None if self.offsets is None else group_tiles(self.offsets, self.rows)


@op("grouped_product")
def grouped_product(
    a: Activation, b: Weight, groups: Groups, dtype: torch.dtype, index: Tensor | None = None
) -> Tensor:
    """Each group's rows of a [M, K] times its b [G, N, K]ᵀ -> [M, N], rounded once to `dtype`. Sums are float32.

    Tensors: row r is a[index[r]] where index [M] int64 is given; b may be a transposed view, and of another dtype, in
    which it is read or cast to a's. Or both in FP8.
    """
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    a = a if index is None else a.index_select(0, index)
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    for group, (start, stop) in enumerate(pairwise([0, *groups.ends])):
        if stop > start:
            multiply(a[start:stop], b[group].t().to(a.dtype), out[start:stop])
    return out


@op("grouped_gradient")
def grouped_gradient(
    a: Activation, b: Activation, groups: Groups, dtype: torch.dtype, index: Tensor | None = None
) -> Tensor:
    """aᵀ · b over each group's own rows of a [M, N] and b [M, K] -> [G, N, K]; zero without rows. In FP8 turned.

    Tensors: row r of b is b[index[r]] where index [M] int64 is given.
    """
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    b = b if index is None else b.index_select(0, index)
    out = torch.empty(len(groups.ends), a.shape[1], b.shape[1], dtype=dtype, device=a.device)
    for group, (start, stop) in enumerate(pairwise([0, *groups.ends])):
        if stop > start:
            multiply(a[start:stop].t(), b[start:stop], out[group])
        else:
            out[group].zero_()
    return out


# ---- the exact arithmetic of FP8, in torch ----


@grouped_product.register("torch", lambda a, *_: isinstance(a, Coded), Priority.TORCH)
def _exact_product(a: Coded, b: Coded, groups: Groups, dtype: torch.dtype, index: None = None) -> Tensor:
    found = []
    for group, (start, stop) in enumerate(pairwise([0, *groups.ends])):
        rows = Coded(a.codes[start:stop], a.scale[start:stop], a.cuts)
        found.append(exact_product(rows, Coded(b.codes[group], b.scale[group])).to(dtype))
    return torch.cat(found)


@grouped_gradient.register("torch", lambda a, *_: isinstance(a, Coded), Priority.TORCH)
def _exact_gradient(a: Coded, b: Coded, groups: Groups, dtype: torch.dtype, index: None = None) -> Tensor:
    edges, found = groups.bands.tolist(), []
    for start, stop in pairwise([0, *groups.ends]):
        bands = tuple(edge - start for edge in edges if start <= edge <= stop)
        left, right = (Coded(t.codes[start:stop].t(), t.scale[start:stop].t(), bands) for t in (a, b))
        found.append(exact_product(left, right).to(dtype))
    return torch.stack(found)
