"""Which rank writes what of a checkpoint, and the copy of it that is written while training goes on.

A rank writes the published tensors (names.py) that lie within its pieces. Those that lie across the pieces of several
ranks, as with FSDP, are joined one at a time, on the rank that has the least to write.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanseek.checkpoint.files import CheckpointError, Lazy
from leanseek.checkpoint.names import hf_parts
from leanseek.checkpoint.pieces import Piece, check_tiling
from leanseek.checkpoint.ranks import Ranks
from leanseek.config import ModelConfig
from leanseek.machine.memory import empty
from leanseek.model import Transformer

Copy = Callable[[Tensor], Tensor]


class Entry(NamedTuple):
    """A piece as other ranks hear of it."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    dtype: torch.dtype


class Split(NamedTuple):
    """A published tensor of which several ranks hold parts: values `start` to `stop` of our tensor `name`."""

    name: str
    start: int
    stop: int
    owner: int  # the rank that writes it


class Plan(NamedTuple):
    whole: dict[str, Tensor]  # the network's state dict, on meta
    sizes: dict[str, int]  # values of each published tensor that one of ours is made of
    dtype: torch.dtype  # of the embedding, which stands for all in config.json
    splits: list[Split]
    writers: list[int]  # ranks that write a file of weights
    state_writers: list[int]


def entries(pieces: Sequence[Piece]) -> list[Entry]:
    """What this rank has to write: an empty slice, as of a matrix with fewer rows than ranks, is nothing."""
    return [Entry(p.name, p.shape, p.start, n, p.tensor.dtype) for p in pieces if (n := p.tensor.numel())]


def plan(config: ModelConfig, weights: Sequence[list[Entry]], state: Sequence[list[Entry]]) -> Plan:
    """Divide the writing of all ranks' entries; every rank computes the same.

    Raises:
        CheckpointError: values are missing or there twice, or a tensor is none of the network's.
    """
    whole = Transformer(config, device="meta").state_dict()
    kinds = _tiled(weights)
    _tiled(state)
    for name in {**kinds, **whole}:
        if name not in kinds or name not in whole or kinds[name].shape != whole[name].shape:
            have = list(kinds[name].shape) if name in kinds else "none"
            asks = list(whole[name].shape) if name in whole else "none"
            raise CheckpointError(f"{name}: the ranks have {have}, the network asks for {asks}")
    sizes = {name: t.numel() // len(hf_parts(name, t, config.num_hidden_layers)) for name, t in whole.items()}
    load = [0] * len(weights)  # bytes each rank writes
    split: dict[tuple[str, int], int] = {}  # published tensor, by the place of its first value -> bytes
    for rank, mine in enumerate(weights):
        for entry in mine:
            size = sizes[entry.name]
            ends = entry.start, entry.start + entry.length
            load[rank] += max(0, ends[1] // size - -(-ends[0] // size)) * size * entry.dtype.itemsize
            for end in ends:
                if end % size:
                    split[entry.name, end // size * size] = size * entry.dtype.itemsize
    splits = []
    for (name, start), cost in split.items():
        owner = load.index(min(load))
        load[owner] += cost
        splits.append(Split(name, start, start + sizes[name], owner))
    ranks = range(len(weights))
    dtype = kinds["embed_tokens.weight"].dtype
    return Plan(
        whole,
        sizes,
        dtype,
        splits,
        [r for r in ranks if load[r]],
        [r for r in ranks if state[r]] or [0],
    )


def _tiled(held: Sequence[list[Entry]]) -> dict[str, Entry]:
    """An entry of each tensor that all ranks' entries make up."""
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    kinds: dict[str, Entry] = {}
    for rank, mine in enumerate(held):
        if len({entry.name for entry in mine}) != len(mine):
            name, count = Counter(entry.name for entry in mine).most_common(1)[0]
            raise CheckpointError(f"rank {rank} has {count} pieces of {name}; a rank holds one range of a tensor")
        for entry in mine:
            first = kinds.setdefault(entry.name, entry)
            if (entry.shape, entry.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{entry.name}: rank {rank} has {entry.dtype} {list(entry.shape)}, "
                    f"others {first.dtype} {list(first.shape)}"
                )
            ranges.setdefault(entry.name, []).append((entry.start, entry.length, f"on rank {rank}"))
    for name, entry in kinds.items():
        check_tiling(name, math.prod(entry.shape), ranges[name], "on no rank")
    return kinds


def copied(tensor: Tensor) -> Tensor:
    """A copy in the memory of the host; pinned where the tensor is on a GPU, which then may still be copying."""
    if tensor.device.type == "cuda":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return empty(tensor.shape, tensor.dtype, "cpu").copy_(tensor)


def weights_to_write(pieces: Sequence[Piece], plan: Plan, config: ModelConfig, ranks: Ranks, copy: Copy) -> list[Lazy]:
    """This rank's share of the weights under their published names. All ranks call it together."""
    mine: dict[tuple[str, int], Tensor] = {}  # whole published tensors, by our name and the place of the first value
    for piece in pieces:
        flat, size = piece.tensor.detach().reshape(-1), plan.sizes[piece.name]
        for start in range(-(-piece.start // size) * size, piece.start + flat.numel() - size + 1, size):
            mine[piece.name, start] = copy(flat[start - piece.start :][:size])
    for split in plan.splits:
        held = [_overlap(piece, split) for piece in pieces if piece.name == split.name]
        found = ranks.gather(held)
        if split.owner == ranks.rank:
            parts = sorted((part for one in found for part in one if part[1].numel()), key=lambda part: part[0])
            mine[split.name, split.start] = torch.cat([values for _, values in parts])
    return list(_published(mine, plan, config))


def _overlap(piece: Piece, split: Split) -> tuple[int, Tensor]:
    """Where the values begin that a piece holds of a split tensor, and the values, on the CPU."""
    flat = piece.tensor.detach().reshape(-1)
    first = min(max(split.start - piece.start, 0), flat.numel())
    last = max(min(split.stop - piece.start, flat.numel()), first)
    return piece.start + first, flat[first:last].cpu()


def _published(mine: dict[tuple[str, int], Tensor], plan: Plan, config: ModelConfig) -> Iterator[Lazy]:
    for name, meta in plan.whole.items():
        for number, part in enumerate(hf_parts(name, meta, config.num_hidden_layers)):
            values = mine.get((name, number * plan.sizes[name]))
            if values is not None:
                shape = tuple(meta[part.place].shape)
                yield Lazy(part.name, values.dtype, shape, values.view(shape).detach)


def state_to_write(pieces: Sequence[Piece], copy: Copy) -> tuple[list[Lazy], dict[str, dict[str, Any]]]:
    """This rank's share of the state, and the places in the whole of the tensors that it does not hold whole."""
    lazies, ranges = [], {}
    for piece in pieces:
        if not (count := piece.tensor.numel()):
            continue
        whole = count == math.prod(piece.shape)
        if not whole:
            ranges[piece.name] = {"start": piece.start, "shape": list(piece.shape)}
        values = copy(piece.tensor.detach()).view(piece.shape if whole else (count,))
        lazies.append(Lazy(piece.name, values.dtype, tuple(values.shape), values.detach))
    return lazies, ranges
