"""Experts get slots on GPUs as DeepSeek's EPLB gives them, no GPU twice the same, and in files that engines read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leanseek import InputError, planning
from leanseek.planning.placement_files import placement_file, serving_options

# The example of DeepSeek's EPLB: 12 experts in 16 slots, 4 groups, 2 nodes, 8 GPUs.
PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def peak(load: list[float], slots: list[int], gpus: int) -> float:
    return max(planning.gpu_loads([load], [slots], gpus)[0])


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16)])
def test_the_published_example(form) -> None:
    load = form(PUBLISHED)
    assert planning.place_experts(load, replicas=16, groups=4, nodes=2, gpus=8) == PLACED


def test_the_published_example_is_as_even_as_published() -> None:
    evenness = [max(row) * 8 / sum(row) for row in planning.gpu_loads(PUBLISHED, PLACED, 8)]
    assert evenness == pytest.approx([1.208, 1.242], abs=5e-4)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], int, int, int, int]:
    """Sizes that divide; loads of all kinds: none, equal, one expert alone, huge ratios."""
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 2)) if draw(st.booleans()) else draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 4))
    gpus = nodes * per_node
    replicas = (-(-experts // gpus) + draw(st.integers(0, 3))) * gpus
    figures = st.one_of(st.integers(0, 6), st.sampled_from([0, 1e-9, 1e9]), st.floats(0, 1e6))
    rows = st.lists(figures, min_size=experts, max_size=experts)
    return draw(st.lists(rows, min_size=1, max_size=2)), replicas, groups, nodes, gpus


@given(cases())
def test_every_placement(case: tuple[list[list[float]], int, int, int, int]) -> None:
    load, replicas, groups, nodes, gpus = case
    experts = len(load[0])
    placement = planning.place_experts(*case)
    assert placement == planning.place_experts(*case)
    hierarchical = groups % nodes == 0
    reach = experts // nodes if hierarchical else experts  # experts that may be on one GPU
    for row, slots in zip(load, placement, strict=True):
        assert len(slots) == replicas and set(slots) == set(range(experts))
        parts = [slots[g * replicas // gpus : (g + 1) * replicas // gpus] for g in range(gpus)]
        if replicas // gpus <= reach:
            assert all(len(set(part)) == len(part) for part in parts)  # never twice on one GPU if it can be avoided
        if hierarchical:
            of_group = [{g * nodes // gpus for g, part in enumerate(parts) for e in part if e * groups // experts == k}
                        for k in range(groups)]  # fmt: skip
            assert all(len(on) == 1 for on in of_group)  # a group stays in one node
        else:
            plain = planning.round_robin(1, experts, replicas)[0]
            assert peak(row, slots, gpus) <= peak(row, plain, gpus) * (1 + 1e-12)


def test_greedy_packing_is_not_kept_where_no_packing_is_more_even() -> None:
    load = [3.0, 3, 0, 2, 2, 2]  # by falling load: 3 + 2 + 2 and 3 + 2 + 0; in order: 6 and 6
    assert peak(load, planning.place_experts([load], 6, 1, 1, 2)[0], 2) == 6


def test_no_two_copies_on_one_gpu_vllm_18343() -> None:
    """One expert so popular that EPLB gives it more copies than there are GPUs; and a packing that has to make room."""
    [slots] = planning.place_experts([[1000, 1, 1, 1, 1, 1]], 12, 1, 1, 4)
    assert planning.repeats([slots], 4) == 0 and Counter(slots)[0] == 4
    for load, replicas, gpus in (
        ([3, 3, 3], 6, 3),
        ([7, 8, 8, 4], 6, 2),
    ):  # the last copy finds room beside its like only
        [slots] = planning.place_experts([load], replicas, 1, 1, gpus)
        assert planning.repeats([slots], gpus) == 0 and set(slots) == set(range(len(load)))
    [slots] = planning.place_experts([[5, 1]], 6, 1, 1, 2)  # three slots a GPU, two experts
    assert planning.repeats([slots], 2) == 2 and set(slots) == {0, 1}


def test_counts_of_copies_add_up_vllm_22167() -> None:
    """An expert's load is that of all its copies, on all ranks: from slot counts the same placement comes back."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 1000, (3, 16)) * 12
    first = planning.place_experts(truth, 24, 4, 2, 8)
    by_slot = [[truth[layer][e] / Counter(slots)[e] for e in slots] for layer, slots in enumerate(first)]
    ranks = np.zeros((8, 3, 24))  # each rank counts its own slots
    for rank in range(8):
        ranks[rank, :, 3 * rank : 3 * rank + 3] = np.array(by_slot)[:, 3 * rank : 3 * rank + 3]
    assert planning.expert_loads(ranks.sum(0), first, 16) == truth.tolist()


def test_a_layer_without_load_is_spread() -> None:
    [slots] = planning.place_experts([[0] * 8], 12, 1, 1, 4)
    assert max(Counter(slots).values()) == 2


def test_the_units_of_the_paper() -> None:
    """Prefill: 32 GPUs, 32 redundant experts. Decode: 320 GPUs of one expert."""
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 0.7, (2, 256))
    for replicas, nodes, gpus in ((288, 4, 32), (320, 40, 320)):
        placement = planning.place_experts(load, replicas, 8, nodes, gpus)
        assert planning.repeats(placement, gpus) == 0
        for row, slots in zip(load.tolist(), placement, strict=True):
            assert peak(row, slots, gpus) < peak(row, planning.round_robin(1, 256, replicas)[0], gpus)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"replicas": 11}, "11 replicas for 12 experts"),
        ({"replicas": 20}, "20 replicas do not divide over 8 GPUs; 16 would"),
        ({"replicas": 12, "gpus": 9, "nodes": 3}, "12 replicas do not divide over 9 GPUs; 18 would"),
        ({"nodes": 3}, "8 GPUs do not divide over 3 nodes"),
        ({"groups": 8}, "12 experts do not divide into 8 groups"),
        ({"gpus": 0}, "gpus = 0 must be at least 1"),
        ({"groups": 0}, "groups = 0 must be at least 1"),
        ({"nodes": -1}, "nodes = -1"),
        ({"load": []}, "at least one layer"),
        ({"load": [[]]}, "at least one layer"),
        ({"load": [[1, 2], [1]]}, "as many experts in each"),
        ({"load": [1, 2, 3]}, "[layers, experts]"),
        ({"load": 5}, "[layers, experts]"),
        ({"load": [["a"]]}, "[layers, experts]"),
        ({"load": torch.zeros(2, 3, 4)}, "[layers, experts]"),
        ({"load": [[1.0] * 11 + [float("nan")]]}, "row 0: the load of expert 11 is nan"),
        ({"load": [[1.0] * 12, [-1.0] * 12]}, "row 1: the load of expert 0 is -1.0"),
        ({"load": [[float("inf")] * 12]}, "is inf"),
    ],
)
def test_nonsense_is_one_line(change: dict, says: str) -> None:
    sizes = {"load": PUBLISHED, "replicas": 16, "groups": 4, "nodes": 2, "gpus": 8} | change
    with pytest.raises(InputError) as caught:
        planning.place_experts(**sizes)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_files_as_engines_read_them() -> None:
    """SGLang: one key (the others would become arguments), dense layers too. vLLM: MoE layers alone, in order."""
    placement = {1: PLACED[0], 2: PLACED[1], 3: PLACED[1]}  # layer 0 is dense, 3 is MTP
    dense = [*range(12), 0, 1, 2, 3]
    assert placement_file("sglang", placement, 3, 12, 8) == {"physical_to_logical_map": [dense, *PLACED]}
    assert placement_file("vllm", placement, 3, 12, 8) == PLACED
    ascend = placement_file("vllm-ascend", placement, 3, 12, 8)
    assert ascend["moe_layer_count"] == 2 and [x["layer_id"] for x in ascend["layer_list"]] == [0, 1]
    devices = ascend["layer_list"][1]["device_list"]
    assert devices[7] == {"device_id": 7, "device_expert": [3, 1]} and len(devices) == 8
    assert serving_options("vllm", "x", 4, 8).endswith("""--enable-eplb --eplb-config '{"num_redundant_experts": 4}'""")
