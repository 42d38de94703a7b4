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
Place = tuple[str, int]  # of a published tensor: our tensor's name, and the first value in the flat whole


class Entry(NamedTuple):
    """A piece as other ranks hear of it."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    dtype: str


class Held(NamedTuple):
    """What a rank holds of a tensor."""

    rank: int
    shape: tuple[int, ...]  # of the whole
    start: int
    length: int
    dtype: str


class Cut(NamedTuple):
    """What a rank holds of a published tensor."""

    rank: int
    start: int  # in our whole tensor
    length: int


class Published(NamedTuple):
    """A tensor of the folder, and who writes it."""

    name: str
    shape: tuple[int, ...]
    owner: int


class Plan(NamedTuple):
    tensors: dict[Place, Published]
    split: dict[Place, list[Cut]]  # those of which several ranks hold parts
    bytes: int  # of all tensors
    dtype: torch.dtype  # of the embedding, which stands for all in config.json
    writers: list[int]  # ranks that write a file of weights
    state_writers: list[int]


def entries(pieces: Sequence[Piece]) -> list[Entry]:
    """What this rank has to write: an empty slice, as of a matrix with fewer rows than ranks, is nothing."""
    return [Entry(p.name, p.shape, p.start, n, str(p.tensor.dtype)[6:]) for p in pieces if (n := p.tensor.numel())]


def heard(told: Sequence[Sequence[Any]]) -> list[Entry]:
    """Entries that came from another rank as JSON."""
    return [Entry(name, tuple(shape), *rest) for name, shape, *rest in told]


def plan(config: ModelConfig, weights: Sequence[list[Entry]], state: Sequence[list[Entry]]) -> Plan:
    """Divide the writing of all ranks' entries; every rank computes the same.

    Raises:
        CheckpointError: values are missing or there twice, or a tensor is none of the network's.
    """
    whole = Transformer(config, device="meta").state_dict()
    held = _tiled(weights)
    _tiled(state)
    load = [0] * len(weights)  # bytes each rank writes
    tensors: dict[Place, Published] = {}
    split: dict[Place, list[Cut]] = {}
    for name in {**held, **whole}:
        have = list(held[name][0].shape) if name in held else "none"
        asks = list(whole[name].shape) if name in whole else "none"
        if have != asks:
            raise CheckpointError(f"{name}: the ranks have {have}, the network asks for {asks}")
        parts = hf_parts(name, whole[name], config.num_hidden_layers)
        size = whole[name].numel() // len(parts)
        for number, (part, cuts) in enumerate(zip(parts, _divided(held[name], size, len(parts)), strict=True)):
            owner = cuts[0].rank if len(cuts) == 1 else load.index(min(load))
            load[owner] += size * _dtype(held[name][0].dtype).itemsize
            tensors[name, number * size] = Published(part.name, tuple(whole[name][part.place].shape), owner)
            if len(cuts) > 1:
                split[name, number * size] = cuts
    dtype = _dtype(held["embed_tokens.weight"][0].dtype)
    writers = [rank for rank, size in enumerate(load) if size]
    return Plan(tensors, split, sum(load), dtype, writers, [r for r, mine in enumerate(state) if mine] or [0])


def _tiled(told: Sequence[list[Entry]]) -> dict[str, list[Held]]:
    """What ranks hold of each tensor, in the order of its values."""
    held: dict[str, list[Held]] = {}
    for rank, mine in enumerate(told):
        if len({entry.name for entry in mine}) != len(mine):
            name, count = Counter(entry.name for entry in mine).most_common(1)[0]
            raise CheckpointError(f"rank {rank} has {count} pieces of {name}; a rank holds one range of a tensor")
        for entry in mine:
            first = held.setdefault(entry.name, [Held(rank, *entry[1:])])[0]
            if (entry.shape, entry.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{entry.name}: rank {rank} has {entry.dtype} {list(entry.shape)}, "
                    f"rank {first.rank} {first.dtype} {list(first.shape)}"
                )
            if first.rank != rank:
                held[entry.name].append(Held(rank, *entry[1:]))
    for name, parts in held.items():
        parts.sort(key=lambda part: part.start)
        ranges = [(part.start, part.length, f"on rank {part.rank}") for part in parts]
        check_tiling(name, math.prod(parts[0].shape), ranges, "on no rank")
    return held


def _divided(held: list[Held], size: int, count: int) -> Iterator[list[Cut]]:
    """Who has what of each of the `count` parts of a tensor, each of `size` values."""
    at = 0
    for begin in range(0, count * size, size):
        cuts = []
        while at < len(held) and held[at].start < begin + size:
            start, stop = max(held[at].start, begin), min(held[at].start + held[at].length, begin + size)
            cuts.append(Cut(held[at].rank, start, stop - start))
            if held[at].start + held[at].length > begin + size:
                break  # the next part begins in it
            at += 1
        yield cuts


def copied(tensor: Tensor) -> Tensor:
    """A copy in the memory of the host; pinned where the tensor is on a GPU, which then may still be copying."""
    if tensor.device.type == "cuda":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return empty(tensor.shape, tensor.dtype, "cpu").copy_(tensor)


def weights_to_write(pieces: Sequence[Piece], plan: Plan, ranks: Ranks, copy: Copy) -> list[Lazy]:
    """This rank's share of the weights under their published names. All ranks call it together."""
    held = {piece.name: (piece.start, piece.tensor.detach().reshape(-1)) for piece in pieces}
    lazies = []
    for (name, place), (published, shape, owner) in plan.tensors.items():
        start, flat = held.get(name, (0, torch.empty(0)))
        if cuts := plan.split.get((name, place)):
            values = _joined(cuts, start, flat, ranks)
        elif owner == ranks.rank:
            values = copy(flat[place - start :][: math.prod(shape)])
        if owner == ranks.rank:
            lazies.append(Lazy(published, values.dtype, shape, values.view(shape).detach))
    return lazies


def _joined(cuts: list[Cut], start: int, flat: Tensor, ranks: Ranks) -> Tensor:
    """A tensor of which several ranks hold parts; ours begin at value `start` of the whole."""
    own = next((cut for cut in cuts if cut.rank == ranks.rank), None)
    found = ranks.gather(own and flat[own.start - start :][: own.length].cpu())
    return torch.cat([found[cut.rank] for cut in cuts])  # in the order of their values


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


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found
