"""Where the copies of each expert go, so that GPUs have equal work (section 3.4; DeepSeek's EPLB).

A layer's experts get `replicas` slots on `gpus` GPUs; a popular expert gets several, and its tokens are split evenly
over them. Hierarchical placement, for small groups of GPUs (prefill): groups of experts go to nodes by load, so that
the tokens of a group stay within a node, then slots go to experts and GPUs within each node. Global placement, for
large ones (decode), takes all GPUs as one node.

Ties are broken the same way everywhere: the lower expert, slot, node or GPU first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from leanseek.errors import InputError

Rows = list[list[float]]  # [layers, experts]
Placement = list[list[int]]  # [layers, replicas]: the expert in each slot; GPU g has slots g·S to (g + 1)·S - 1


class PlacementError(InputError):
    """Loads that are not numbers, or sizes that do not divide."""


def place_experts(load: Iterable[Iterable[float]], replicas: int, groups: int, nodes: int, gpus: int) -> Placement:
    """The expert in each slot of each layer, from how many tokens each expert gets.

    Hierarchical if `nodes` divides `groups`, else global. A layer is never less even than `round_robin` (hierarchical:
    within each node). A layer without load is placed as if its experts were equally busy.

    No GPU gets an expert twice, unless it has more slots than there are experts to fill them (hierarchical: experts on
    its node). DeepSeek's EPLB does not see to that (vLLM#18343): a second copy on a GPU takes memory and no load.

    Args:
        load: [layers, experts], lists, an array or a tensor, not negative; only ratios matter.
        replicas: slots, over all GPUs.
        groups: groups of experts of node-limited routing (`n_group`).

    Returns:
        [layers, replicas], the expert in each slot.

    Raises:
        PlacementError: sizes that do not divide, fewer slots than experts, or a load that is not a number.
    """
    rows = _rows(load)
    experts = len(rows[0])
    whole = groups > 0 and nodes > 0 and groups % nodes == 0
    _check(experts, replicas, groups, nodes, gpus, whole)
    if not whole:
        groups = nodes = 1
    return [_place(row if any(row) else [1.0] * experts, replicas, groups, nodes, gpus) for row in rows]


def round_robin(layers: int, experts: int, replicas: int) -> Placement:
    """The placement that looks at no load: experts in order, then again from the first."""
    return [[slot % experts for slot in range(replicas)] for _ in range(layers)]


def gpu_loads(load: Iterable[Iterable[float]], placement: Sequence[Sequence[int]], gpus: int) -> Rows:
    """Load of each GPU [layers, gpus]: an expert's tokens are split evenly over its copies."""
    out = []
    for row, slots in zip(_rows(load), placement, strict=True):
        copies = Counter(slots)
        out.append([math.fsum(row[e] / copies[e] for e in part) for part in _parts(slots, gpus)])
    return out


def expert_loads(copies: Iterable[Iterable[float]], placement: Sequence[Sequence[int]], experts: int) -> Rows:
    """Load of each expert [layers, experts], from that of each slot [layers, replicas] summed over all ranks.

    An expert's load is the sum over its copies; the load of one copy would make a popular expert look idle.
    """
    out = []
    for row, slots in zip(_rows(copies), placement, strict=True):
        if len(row) != len(slots):
            raise PlacementError(f"{len(row):,} counts for {len(slots):,} slots")
        total = [0.0] * experts
        for count, expert in zip(row, slots, strict=True):
            total[expert] += count
        out.append(total)
    return out


def repeats(placement: Sequence[Sequence[int]], gpus: int) -> int:
    """Slots, over all layers, that hold an expert which their GPU has in another slot."""
    return sum(len(part) - len(set(part)) for slots in placement for part in _parts(slots, gpus))


# ---- one layer ----


def _place(row: list[float], replicas: int, groups: int, nodes: int, gpus: int) -> list[int]:
    size = len(row) // groups
    by_group = [list(range(start, start + size)) for start in range(0, len(row), size)]
    out: list[int] = []
    for held in _pack(list(range(groups)), [math.fsum(row[e] for e in group) for group in by_group], nodes):
        experts = [e for group in held for e in by_group[group]]
        slots = _fill([row[e] for e in experts], replicas // nodes, gpus // nodes)
        out += [experts[e] for e in slots]
    return out


def _fill(row: list[float], replicas: int, gpus: int) -> list[int]:
    """The slots of one node, whose experts have the loads `row`."""
    slots = _replicate(row, replicas, gpus)
    copies = Counter(slots)
    packed = [e for part in _pack(slots, [row[e] / copies[e] for e in slots], gpus) for e in part]
    plain = round_robin(1, len(row), replicas)[0]  # greedy packing is not always the better one
    return min(packed, plain, key=lambda p: max(gpu_loads([row], [p], gpus)[0]))


def _replicate(row: list[float], replicas: int, gpus: int) -> list[int]:
    """The expert of each slot: all of them, then for each slot left the one with the largest load a copy.

    An expert on every GPU gets no more copies as long as others are not.
    """
    copies = [1] * len(row)
    slots = list(range(len(row)))
    while len(slots) < replicas:
        able = [e for e in slots[: len(row)] if copies[e] < gpus] or slots[: len(row)]
        chosen = max(able, key=lambda e: row[e] / copies[e])
        copies[chosen] += 1
        slots.append(chosen)
    return slots


def _pack(items: list[int], loads: list[float], bins: int) -> list[list[int]]:
    """Packs items, some of which come several times, into bins of equal size: by falling load, to the lightest free."""
    size = len(items) // bins
    if size == 1:
        return [[item] for item in items]
    held: list[list[int]] = [[] for _ in range(bins)]  # places in `items`
    weight = [0.0] * bins
    for place in sorted(range(len(items)), key=lambda i: -loads[i]):
        free = [b for b in range(bins) if len(held[b]) < size]
        new = [b for b in free if all(items[i] != items[place] for i in held[b])]
        into = min(new or free, key=weight.__getitem__)
        if not new:
            into = _make_room(place, into, items, loads, held, weight)
        held[into].append(place)
        weight[into] += loads[place]
    return [[items[i] for i in places] for places in held]


def _make_room(
    place: int, free: int, items: list[int], loads: list[float], held: list[list[int]], weight: list[float]
) -> int:
    """Moves an item from a full bin without this one to the bin `free`, which has it; returns the bin with room.

    A full bin without it has an item that `free` lacks, because it has more items and none twice. So only if every bin
    has this item is there nothing to move: then `free` is returned.
    """
    inside = {items[i] for i in held[free]}
    moves = [
        (max(weight[free] + loads[i], weight[b] - loads[i] + loads[place]), b, i)
        for b, places in enumerate(held)
        if items[place] not in {items[i] for i in places}
        for i in places
        if items[i] not in inside
    ]
    if not moves:
        return free
    _, full, moved = min(moves)
    held[full].remove(moved)
    held[free].append(moved)
    weight[full] -= loads[moved]
    weight[free] += loads[moved]
    return full


# ---- what comes in ----


def _parts(slots: Sequence[int], gpus: int) -> list[Sequence[int]]:
    size = len(slots) // gpus
    return [slots[start : start + size] for start in range(0, len(slots), size)]


def _rows(load: Any) -> Rows:
    try:
        rows = [[float(x) for x in row] for row in load]
    except (TypeError, ValueError):
        raise PlacementError("loads are numbers [layers, experts]: a list of lists, an array or a tensor") from None
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise PlacementError("loads are numbers [layers, experts]: at least one layer, and as many experts in each")
    for layer, row in enumerate(rows):
        for expert, x in enumerate(row):
            if not 0 <= x < math.inf:
                raise PlacementError(f"row {layer}: the load of expert {expert} is {x}; it must be finite, at least 0")
    return rows


def _check(experts: int, replicas: int, groups: int, nodes: int, gpus: int, hierarchical: bool) -> None:
    for name, value in {"replicas": replicas, "groups": groups, "nodes": nodes, "gpus": gpus}.items():
        if value < 1:
            raise PlacementError(f"{name} = {value} must be at least 1")
    if replicas < experts:
        raise PlacementError(f"{replicas:,} replicas for {experts:,} experts: every expert needs one")
    if replicas % gpus:
        near = max(-(-experts // gpus), round(replicas / gpus)) * gpus
        raise PlacementError(f"{replicas:,} replicas do not divide over {gpus:,} GPUs; {near:,} would")
    if gpus % nodes:
        raise PlacementError(f"{gpus:,} GPUs do not divide over {nodes:,} nodes")
    if hierarchical and experts % groups:
        raise PlacementError(f"{experts:,} experts do not divide into {groups:,} groups")
