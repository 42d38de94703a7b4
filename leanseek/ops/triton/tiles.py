"""How rows that belong to experts are cut into tiles: a table that one routing shares among all its products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.ops.triton.numbers import TILE


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
