"""Experts on several ranks are those of one process: outputs, all gradients, whatever the routing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from leanseek import fp8, ops
from leanseek.distributed.exchange import Exchange, addresses, pack, unpack
from leanseek.fp8.recipe import Cast, Tilewise
from leanseek.ops import quantize

pytestmark = pytest.mark.distributed
Run = Callable[..., list[Any]]


class Case(NamedTuple):
    """Tokens of all ranks, one rank's after another's."""

    x: Tensor  # [N, D]
    indices: Tensor  # [N, K]
    weights: Tensor  # [N, K]
    gate_up: Tensor  # [E, 2I, D]
    down: Tensor  # [E, D, I]
    probe: Tensor  # [N, D], the output's gradient
    counts: tuple[int, ...]  # tokens of each rank


def problem(
    counts: tuple[int, ...], experts: int, k: int, width: int = 16, size: int = 12, seed: int = 0,
    among: tuple[int, ...] = (),
) -> Case:  # fmt: skip
    """`among`: the experts that tokens choose, all by default."""
    generator = torch.Generator().manual_seed(seed)
    n, offered = sum(counts), torch.tensor(among or range(experts))
    choices = [offered[torch.randperm(len(offered), generator=generator)[:k]] for _ in range(n)]
    indices = torch.stack(choices) if n else torch.zeros(0, k, dtype=torch.int64)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return Case(
        draw(n, width), indices, draw(n, k).abs() + 0.1, draw(experts, 2 * size, width) / width**0.5,
        draw(experts, width, size) / size**0.5, draw(n, width), counts,
    )  # fmt: skip


@functools.cache
def groups(nodes: int) -> list[dist.ProcessGroup]:
    """The group of all ranks; or of this rank's place on every node, and of its node."""
    ranks = torch.arange(dist.get_world_size()).view(nodes, -1)
    if nodes == 1:
        return [dist.group.WORLD]
    return [dist.new_subgroups_by_enumeration(t.tolist())[0] for t in (ranks.t(), ranks)]


def products(sent: ops.Dispatched, gate_up: Tensor, down: Tensor, precision: str) -> Tensor:
    if precision == "bf16":
        return ops.expert_products(sent, gate_up, down)
    return fp8.expert_products(sent, gate_up, down, Cast(Tilewise()))


def on_a_rank(rank: int, case: Case, nodes: int, precision: str, wire: bool) -> tuple[list[Tensor], list[int]]:
    """Output, gradients of x, weights, gate_up and down, of this rank's part; bytes that went to others, by hop."""
    ranks, experts = dist.get_world_size(), case.down.shape[0]
    begin, n, share = sum(case.counts[:rank]), case.counts[rank], experts // ranks
    mine, held = slice(begin, begin + n), slice(rank * share, (rank + 1) * share)
    parts = case.x[mine], case.weights[mine], case.gate_up[held], case.down[held]
    leaves = [t.clone().requires_grad_() for t in parts]
    exchange = Exchange(groups(nodes), experts, wire)
    sending = exchange.dispatch(leaves[0], case.indices[mine], leaves[1])
    rows = products(sending.wait(), *leaves[2:], precision)
    sent = [hop.sent_bytes for hop in exchange.hops]
    out = sending.combine(rows).wait()
    out.backward(case.probe[mine])
    return [out.detach(), *(leaf.grad for leaf in leaves)], sent


def spread(run_ranks: Run, ranks: int, case: Case, nodes: int = 1, precision: str = "bf16", wire: bool = False):
    found = run_ranks(ranks, on_a_rank, case, nodes, precision, wire)
    return [torch.cat(parts) for parts in zip(*(tensors for tensors, _ in found), strict=True)]


def alone(case: Case, precision: str = "bf16", rounded: bool = False) -> list[Tensor]:
    """The same in this process. rounded: the output's gradient is in 1×128 tiles, as it travels in FP8."""
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weights, case.gate_up, case.down)]
    sent = ops.expert_dispatch(leaves[0], case.indices, leaves[1], case.down.shape[0])
    out = ops.expert_combine(products(sent, *leaves[2:], precision), sent)
    probe = unpack(*pack(case.probe), out.dtype) if rounded else case.probe
    out.backward(probe)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """To within `tolerance` of the largest value."""
    names = "output", "x", "weights", "gate_up", "down"
    for name, a, b in zip(names, found, expected, strict=False):
        assert a is not None and a.shape == b.shape and a.dtype == b.dtype, name
        limit = tolerance * float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=limit, msg=lambda text, n=name: f"{n}: {text}")


ROUTINGS = {
    "even": problem((12, 12), 8, 3),
    "uneven": problem((3, 29), 8, 3),
    "one rank without tokens": problem((0, 17), 8, 3),
    "the other rank without tokens": problem((17, 0), 8, 3),
    "no tokens at all": problem((0, 0), 8, 3),
    "all to the first rank": problem((9, 14), 8, 3, among=(0, 1, 3)),
    "all to the last expert": problem((9, 14), 8, 1, among=(7,)),
    "every expert": problem((5, 6), 4, 4),
    "one choice": problem((11, 6), 8, 1),
    "one expert each": problem((11, 6), 2, 1),
}


@pytest.mark.parametrize("case", ROUTINGS.values(), ids=ROUTINGS)
def test_two_ranks_are_one_process(run_ranks: Run, case: Case) -> None:
    """pytorch#160285: expert gradients are sums, not EP times too large; Automodel#2995, #3680: a rank without tokens
    enters every collective, and its gradients are zeros."""
    equal(spread(run_ranks, 2, case), alone(case), 1e-6)


FOUR = {
    "even": problem((8, 8, 8, 8), 8, 3),
    "empty and uneven": problem((0, 21, 5, 0), 16, 4),
    "all to one rank": problem((4, 9, 2, 7), 8, 2, among=(4, 5)),
    "all to one node": problem((4, 9, 2, 7), 8, 3, among=(4, 5, 6, 7)),
    "nobody": problem((0, 0, 0, 0), 4, 2),
    "every expert": problem((3, 2, 4, 1), 4, 4),
}


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("case", FOUR.values(), ids=FOUR)
def test_four_ranks_and_nodes_are_one_process(run_ranks: Run, case: Case, nodes: int) -> None:
    equal(spread(run_ranks, 4, case, nodes), alone(case), 1e-6)


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])  # each failure costs new processes
@given(
    counts=st.tuples(*[st.integers(0, 12)] * 4),
    shape=st.sampled_from([(4, 1), (4, 4), (8, 2), (12, 5), (16, 3)]),
    nodes=st.sampled_from([1, 2, 4]),
    offered=st.integers(0, 2**16 - 1),
    seed=st.integers(0, 2**31),
)
def test_any_routing(
    run_ranks: Run, counts: tuple[int, ...], shape: tuple[int, int], nodes: int, offered: int, seed: int
) -> None:
    experts, k = shape
    among = tuple(e for e in range(experts) if offered >> e & 1)
    case = problem(counts, experts, k, 8, 4, seed, among if len(among) >= k else ())
    equal(spread(run_ranks, 4, case, nodes), alone(case), 2e-6)


def in_bf16(case: Case) -> Case:
    return case._replace(x=case.x.bfloat16(), probe=case.probe.bfloat16())


WIDE = [problem((70, 130), 8, 3, 160, 40), problem((0, 90), 4, 4, 256, 128), problem((50, 60), 8, 2, 33, 20)]


@pytest.mark.parametrize("case", WIDE, ids=lambda c: f"{c.counts} x {c.x.shape[1]}")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_bf16_rows(run_ranks: Run, case: Case, precision: str) -> None:
    """An expert computes what it would alone, bit for bit; the sum of a rank's experts is rounded on its way."""
    found, expected = spread(run_ranks, 2, in_bf16(case), precision=precision), alone(in_bf16(case), precision)
    equal(found[:2], expected[:2], 2**-7)
    assert all(torch.equal(a, b) for a, b in zip(found[2:], expected[2:], strict=True))


@pytest.mark.parametrize("case", WIDE, ids=lambda c: f"{c.counts} x {c.x.shape[1]}")
def test_fp8_on_the_wire_is_the_rounding_of_the_products(run_ranks: Run, case: Case) -> None:
    """Tokens quantised before they leave are what experts quantise when they arrive. The gradient before the
    down-projection is too (3.3.2), and its weight gradient reads it after that."""
    case = in_bf16(case)
    found, expected = spread(run_ranks, 2, case, precision="fp8", wire=True), alone(case, "fp8", rounded=True)
    equal(found[:2], expected[:2], 2**-7)
    assert all(torch.equal(a, b) for a, b in zip(found[2:], expected[2:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 127, 128, 300])
def test_what_was_packed_is_quantised_to_the_same_values(dtype: torch.dtype, width: int) -> None:
    """Also where a tile's largest code is rounded to half the range, is zero, subnormal, or not finite."""
    x = torch.randn(40, width) * torch.logspace(-44, 38, 40)[:, None]
    x[0, 0], x[1], x[2, 0], x[3, 0] = 224.5, 0.0, torch.nan, torch.inf
    x = x.to(dtype)
    codes, exponents = pack(x)
    once = unpack(codes, exponents, dtype)
    assert codes.shape == (40, width) and exponents.shape == (40, -(-width // 128))
    assert codes.itemsize == exponents.itemsize == 1
    assert torch.equal(once.isfinite(), x.isfinite())
    assert torch.equal(unpack(*pack(once), dtype).nan_to_num(), once.nan_to_num())
    for backend in ("torch", "native"):
        with ops.use(backend):
            a, b = (quantize.rows(t, True)[1].wide().nan_to_num() for t in (x, once))
        assert torch.equal(a, b)


# ---- bytes ----


@pytest.mark.parametrize(
    ("ranks", "nodes", "n_group", "topk_group"), [(4, 4, 4, 2), (4, 4, 4, 3), (4, 2, 4, 1), (2, 2, 2, 1)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_token_goes_to_each_of_its_nodes_once(
    run_ranks: Run, ranks: int, nodes: int, n_group: int, topk_group: int, seed: int
) -> None:
    """Node-limited routing (2.1.2): at most topk_group copies of a token leave their node, one for each node."""
    experts, k, width = 16, 4, 24
    case = problem((20, 5, 0, 31)[:ranks], experts, k, width, seed=seed)
    scores = torch.rand(case.x.shape[0], experts, generator=torch.Generator().manual_seed(seed))
    case = case._replace(indices=ops.select_experts(scores, None, k, n_group, topk_group, 2))
    found = run_ranks(ranks, on_a_rank, case, nodes, "bf16", False)
    node_of_token = torch.arange(ranks).repeat_interleave(torch.tensor(case.counts)) // (ranks // nodes)
    pairs = {(t, e * nodes // experts) for t, chosen in enumerate(case.indices.tolist()) for e in chosen}
    away = sum(int(node_of_token[t]) != node for t, node in pairs)
    a_row = width * 4 + k * (4 + 8)  # a token in float32, its gate values, the numbers of its experts
    sizes = ranks * (nodes - 1) * 16  # two int64 for each peer
    assert sum(sent[0] for _, sent in found) == away * a_row + sizes
    assert away <= topk_group * case.x.shape[0]


@pytest.mark.parametrize("seed", range(4))
def test_v3_sends_a_token_to_four_nodes_at_most(seed: int) -> None:
    """256 experts on 8 nodes, 8 of them in at most 4 groups, and the row of a token is the one of its first choice."""
    scores = torch.rand(50, 256, generator=torch.Generator().manual_seed(seed))
    indices = ops.select_experts(scores, None, 8, 8, 4, 2)
    found = addresses(indices, 8, 32)
    nodes = [sorted({e // 32 for e in chosen}) for chosen in indices.tolist()]
    assert found.counts[:, 0].tolist() == [sum(p in mine for mine in nodes) for p in range(8)]
    assert found.counts[:, 1].tolist() == torch.bincount(indices.flatten() // 32, minlength=8).tolist()
    assert found.token.tolist() == [t for p in range(8) for t, mine in enumerate(nodes) if p in mine]
    assert max(map(len, nodes)) == 4
    place, row = found.place.view(50, 8).tolist(), 0
    for p in range(8):
        for t in range(50):
            if p in nodes[t]:
                first = next(k for k, e in enumerate(indices[t].tolist()) if e // 32 == p)
                assert place[t][first] == row
                row += 1
    assert sum(r >= 0 for rows in place for r in rows) == row


# ---- what must reach nothing ----


def poisoned(rank: int, case: Case, nodes: int) -> list[Tensor]:
    """As `on_a_rank`, where memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        return on_a_rank(rank, case, nodes, "bf16", False)[0]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("nodes", [1, 2])
def test_nan_in_unused_memory_reaches_nothing(run_ranks: Run, nodes: int) -> None:
    """transformers#48205: rows beyond the last expert's were read."""
    case = problem((6, 0, 11, 3), 8, 3, among=(0, 1, 2, 6))
    found = [torch.cat(parts) for parts in zip(*run_ranks(4, poisoned, case, nodes), strict=True)]
    equal(found, alone(case), 1e-6)


def test_nan_of_a_token_stays_its_own(run_ranks: Run) -> None:
    case = problem((8, 8), 4, 2)
    case.x[3] = torch.nan
    out, dx, dweights, *_ = spread(run_ranks, 2, case)
    for found in (out, dx, dweights):
        assert found.isnan().any(1).nonzero().flatten().tolist() == [3]


# ---- two exchanges at a time ----


def interleaved(rank: int, first: Case, second: Case) -> list[Tensor]:
    """Two micro-batches: what leaves for one travels while the other computes."""
    exchange, gate_up, down, mine = _shared(rank, first, second)
    sending = [exchange.dispatch(x, indices, weights) for x, indices, weights, _ in mine]
    rows = [ops.expert_products(s.wait(), gate_up, down) for s in reversed(sending)][::-1]
    back = [s.combine(r) for s, r in zip(sending, rows, strict=True)]
    outs = [b.wait() for b in reversed(back)][::-1]
    torch.autograd.backward(outs, [m[3] for m in mine])
    return [*(o.detach() for o in outs), *(t.grad for m in mine for t in (m[0], m[2])), gate_up.grad, down.grad]


def overlapped(rank: int, first: Case, second: Case) -> list[Tensor]:
    """An overlapped pair: the segments of the first's backward and of the second's forward take turns, and each
    exchange runs beside a segment of the other (profile-data's order)."""
    exchange, gate_up, down, mine = _shared(rank, first, second)
    (x, indices, weights, probe), (x2, indices2, weights2, probe2) = mine
    sending = exchange.dispatch(x, indices, weights)
    leave, sending.ticket = sending.ticket, sending.ticket.detach().requires_grad_()
    back = sending.combine(ops.expert_products(sending.wait(), gate_up, down))
    cut = back._replace(ticket=back.ticket.detach().requires_grad_())
    out = cut.wait()
    # the pair
    gradient = torch.autograd.grad(out, cut.ticket, probe)  # combine(B) leaves
    sending2 = exchange.dispatch(x2, indices2, weights2)  # attn(F), dispatch(F) leaves
    torch.autograd.backward(back.ticket, gradient, inputs=[gate_up, down, sending.ticket])  # mlp(B), dispatch(B) leaves
    back2 = sending2.combine(ops.expert_products(sending2.wait(), gate_up, down))  # mlp(F), combine(F) leaves
    torch.autograd.backward(leave, sending.ticket.grad)  # attn(B)
    out2 = back2.wait()
    out2.backward(probe2)
    return [out.detach(), out2.detach(), x.grad, weights.grad, x2.grad, weights2.grad, gate_up.grad, down.grad]


def _shared(rank: int, *cases: Case) -> tuple[Exchange, Tensor, Tensor, list[tuple[Tensor, ...]]]:
    held, mine = slice(rank * 4, rank * 4 + 4), []
    for case in cases:
        rows = slice(sum(case.counts[:rank]), sum(case.counts[: rank + 1]))
        x, weights = (t[rows].clone().requires_grad_() for t in (case.x, case.weights))
        mine.append((x, case.indices[rows], weights, case.probe[rows]))
    gate_up, down = (t[held].clone().requires_grad_() for t in (cases[0].gate_up, cases[0].down))
    return Exchange(groups(1), 8), gate_up, down, mine


@pytest.mark.parametrize("turns", [interleaved, overlapped])
@pytest.mark.parametrize("counts", [(13, 2), (0, 7)])
def test_two_exchanges_at_a_time(run_ranks: Run, turns: Callable[..., list[Tensor]], counts: tuple[int, int]) -> None:
    first, second = problem((7, 9), 8, 3), problem(counts, 8, 3, seed=5)
    second = second._replace(gate_up=first.gate_up, down=first.down)
    found = [torch.cat(parts) for parts in zip(*run_ranks(2, turns, first, second), strict=True)]
    a, b = alone(first), alone(second)
    equal([found[0], *found[2:4], found[6], found[7]], [*a[:3], a[3] + b[3], a[4] + b[4]], 1e-6)
    equal([found[1], *found[4:6]], b[:3], 1e-6)
