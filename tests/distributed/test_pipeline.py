"""A pipeline trains as one process does: gradients to the bit, but for an embedding that two stages read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanseek import ModelConfig, Transformer, fp8
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.distributed import exchange, experts, turns
from leanseek.distributed.pipeline import Pipeline, Place
from leanseek.distributed.turns import Turns
from leanseek.model import Stage
from leanseek.ops import WeightGradients, deferred, linear
from leanseek.planning.schedules import SCHEDULES, Action, Span, bubble, build, measured, simulate
from leanseek.training.balance import add_counts
from leanseek.training.objective import Losses, losses
from leanseek.training.part import Part

pytestmark = pytest.mark.distributed
Run = Callable[..., list[Any]]
MODEL = ModelConfig(
    vocab_size=67, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=8,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2,
    num_nextn_predict_layers=2, initializer_range=0.1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    schedule: str = "dualpipev"
    micro_batches: int = 9
    tied: bool = False
    mtp: int = 2
    recompute: bool = False
    precision: str = "bf16"
    dtype: torch.dtype = torch.float32

    @property
    def config(self) -> ModelConfig:
        return dataclasses.replace(MODEL, tie_word_embeddings=self.tied, num_nextn_predict_layers=self.mtp)

    def parts(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        shape = self.micro_batches, 2, 6 + self.config.lookahead
        tokens = torch.randint(0, self.config.vocab_size, shape, generator=generator)
        return [Batch(part, 2 * self.micro_batches) for part in tokens]

    def model(self, *stages: Stage) -> Transformer:
        found = Transformer(self.config, stages=stages).init_weights(5)
        fp8.apply(found, self.precision)
        return found

    def forward(self, model: Transformer) -> Callable[..., Losses]:
        options = {"mtp_weight": 0.3, "sequence_alpha": 0.5, "dtype": self.dtype, "recompute": self.recompute}
        return lambda batch, hidden=None, stage=0: losses(
            model, batch.tokens, hidden, share=batch.share, stage=stage, **options
        )

    def stages(self, ranks: int, rank: int) -> list[Stage]:
        schedule = build(self.schedule, ranks, max(self.micro_batches, 2 * ranks))
        n, layers = schedule.stages, self.config.num_hidden_layers
        cuts = [range(a, b) for a, b in pairwise([i * layers // n for i in range(n + 1)])]
        return [Stage(cuts[s], s == 0, s == n - 1) for s in schedule.stages_of(rank)]


@functools.cache
def whole(case: Case) -> tuple[Tensor, dict[int, Tensor], dict[str, Tensor]]:
    """Sums of losses, counts and gradients of one process."""
    model, sums, counts = case.model(), torch.zeros(3), {}
    for batch in case.parts():
        found = case.forward(model)(batch)
        found.backward()
        add_counts(counts, found.routes)
        sums += torch.stack((found.main, found.mtp, found.balance)).detach()
    return sums, counts, gradients(model)


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


_PLACES: dict[int, Place] = {}


def place(rank: int, pp: int) -> Place:
    """In one pipeline of all four ranks, or in the first or second of two ranks."""
    if pp not in _PLACES:
        for start in range(0, 4, pp):
            members = list(range(start, start + pp))
            groups = dist.new_group(members), dist.new_group(members)
            if rank in members:
                _PLACES[pp] = Place(pp, rank - start, groups)
    return _PLACES[pp]


def pipeline(case: Case, place: Place, model: Transformer, device: str = "cpu", **options: bool) -> Pipeline:
    first, last = (getattr(model.stages[i], end) for i, end in ((0, "first"), (-1, "last")))
    copied = first != last and (case.tied or case.mtp > 0)
    return Pipeline(
        case.schedule,
        place,
        lookahead=case.config.lookahead,
        width=case.config.hidden_size,
        dtype=case.dtype,
        device=torch.device(device),
        copied=model.embed_tokens.weight if copied else None,
        **options,
    )


def train(rank: int, pp: int, case: Case) -> tuple[Tensor, dict[int, Tensor], dict[str, Tensor]]:
    here = place(rank, pp)
    model = case.model(*case.stages(pp, here.rank))
    sums, counts = pipeline(case, here, model).accumulate(case.parts(), case.forward(model))
    return sums, counts, gradients(model)


CASES = [
    *(Case(schedule, recompute=True) for schedule in SCHEDULES),
    *(Case(schedule, tied=True, mtp=1, micro_batches=8) for schedule in SCHEDULES),
    *(Case(schedule, precision="fp8", dtype=torch.bfloat16, recompute=True, micro_batches=8) for schedule in SCHEDULES),
    Case("zb1p", tied=True, mtp=0),
    Case("dualpipev", mtp=0, dtype=torch.bfloat16),
    Case("1f1b", micro_batches=1),  # fewer than stages
    Case("zb1p", micro_batches=3),
]


def name(case: Case) -> str:
    changed = [f for f in dataclasses.fields(Case) if getattr(case, f.name) != f.default or f.name == "schedule"]
    return "-".join(f"{f.name}={getattr(case, f.name)}" if f.name != "schedule" else case.schedule for f in changed)


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_pipeline_is_one_process(run_ranks: Run, pp: int, case: Case) -> None:
    """Losses, counts and gradients, also with recomputation (Automodel#3257); 1F1B on four ranks has one without MoE
    layers."""
    expected, found = whole(case), run_ranks(4, train, pp, case, timeout=120)
    for start in range(0, 4, pp):
        agree(case, found[start : start + pp], *expected)


def agree(case: Case, found: list[Any], sums: Tensor, counts: dict[int, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(sum(s for s, _, _ in found), sums, rtol=1e-6, atol=0)
    assert sorted(layer for _, c, _ in found for layer in c) == sorted(counts)  # each once (torchtitan#1304, #1593)
    assert all(torch.equal(c[layer], counts[layer]) for _, c, _ in found for layer in c)
    assert {n for _, _, g in found for n in g} == set(expected)
    for _, _, own in found:
        for name, gradient in own.items():
            if name == "embed_tokens.weight":  # sums in another order
                assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm()
            else:
                assert torch.equal(gradient, expected[name]), name
    if case.schedule != "dualpipev" and (case.tied or case.mtp):  # Megatron#844
        first, last = found[0][2], found[-1][2]
        assert torch.equal(first["embed_tokens.weight"], last["embed_tokens.weight"])


def steps(rank: int, case: Case) -> Tensor:
    """The embedding after three optimizer steps."""
    here = place(rank, 4)
    model = case.model(*case.stages(4, here.rank))
    own, optimizer = pipeline(case, here, model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        own.accumulate(case.parts(), case.forward(model))
        optimizer.step()
    return getattr(model, "embed_tokens", model.rotary).state_dict().get("weight", torch.empty(0))


@pytest.mark.parametrize("case", [Case("1f1b"), Case("zb1p", tied=True, mtp=0)], ids=name)
def test_mtp_embedding_copies_stay_equal_megatron_bridge_5380(run_ranks: Run, case: Case) -> None:
    first, second, third, last = run_ranks(4, steps, case, timeout=120)
    assert torch.equal(first, last) and second.numel() == third.numel() == 0
    assert not torch.equal(first, case.model().embed_tokens.weight)


def evaluate(rank: int, case: Case) -> Tensor:
    here = place(rank, 4)
    model = case.model(*case.stages(4, here.rank))
    sums = pipeline(case, here, model).evaluate(case.parts(), case.forward(model))
    assert all(p.grad is None for p in model.parameters())
    return sums


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("micro_batches", [1, 5])
def test_evaluation_takes_any_number_of_micro_batches(run_ranks: Run, schedule: str, micro_batches: int) -> None:
    case = Case(schedule, micro_batches)
    torch.testing.assert_close(sum(run_ranks(4, evaluate, case, timeout=120)), whole(case)[0], rtol=1e-6, atol=0)


# ---- pairs that overlap, two stages of two ranks that share the experts ----


@functools.cache
def two_by_two() -> tuple[Place, int, dist.ProcessGroup]:
    """Ranks in rows of a stage: the place in the column's pipeline, that in the row, and the row's group."""
    rank = dist.get_rank()
    columns = [(dist.new_group([c, c + 2]), dist.new_group([c, c + 2])) for c in range(2)]
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return Place(2, rank // 2, columns[rank % 2]), rank % 2, rows[rank // 2]


def shared_experts_of(case: Case, overlap: bool) -> tuple[Pipeline, Transformer, list[Batch]]:
    place, column, row = two_by_two()
    model = Transformer(case.config, stages=case.stages(2, place.rank), experts=range(4 * column, 4 * column + 4))
    fp8.apply(model.init_weights(5), case.precision)
    experts.apply(model, exchange.Exchange([row], case.config.n_routed_experts, fp8=case.precision == "fp8"))
    batches = [batch.rows(column, column + 1) for batch in case.parts()]
    return pipeline(case, place, model, overlap=overlap, trace=True), model, batches


def overlapped(rank: int, case: Case, overlap: bool) -> tuple[Tensor, dict[int, Tensor], dict[str, Tensor], list[Span]]:
    own, model, batches = shared_experts_of(case, overlap)
    sums, counts = own.accumulate(batches, case.forward(model))
    assert own.timeline()[own.place.rank][0].start >= 0
    return sums, counts, gradients(model), [span.step for span in own.recorded]


@pytest.mark.parametrize(
    "case",
    [
        Case(micro_batches=6),
        Case(micro_batches=4, tied=True, mtp=0, recompute=True),
        Case(micro_batches=4, precision="fp8", dtype=torch.bfloat16),
    ],
    ids=name,
)
def test_pairs_that_overlap_change_no_bit(run_ranks: Run, case: Case) -> None:
    """And together the ranks have one process's gradients, in FP8 but for the rounding of exchanged gradients."""
    found = run_ranks(4, overlapped, case, True, timeout=120)
    plain = run_ranks(4, overlapped, case, False, timeout=120)
    plan = build("dualpipev", 2, case.micro_batches)
    for rank, ((*own, steps), (*other, _)) in enumerate(zip(found, plain, strict=True)):
        assert steps == plan.steps[rank // 2] and any(len(step) == 2 for step in steps)
        assert torch.equal(own[0], other[0]) and own[1].keys() == other[1].keys() and own[2].keys() == other[2].keys()
        assert all(torch.equal(own[i][key], other[i][key]) for i in (1, 2) for key in own[i])
    sums, counts, expected = whole(case)
    torch.testing.assert_close(
        sum(own[0] for own in found), sums, rtol=1e-2 if case.precision == "fp8" else 1e-5, atol=0
    )
    if case.precision == "fp8":
        return
    for left, right in (found[:2], found[2:]):
        assert all(torch.equal(left[1][layer] + right[1][layer], counts[layer]) for layer in left[1])
        for name, a in left[2].items():
            b = right[2][name]
            gradient = torch.cat((a, b)) if ".experts." in name else a + b
            assert (gradient - expected[name]).norm() <= 5e-6 * expected[name].norm(), name


def pair_events(rank: int, case: Case) -> list[str]:
    """What the first pair of a rank starts, in order: F or B, and which way rows go, or its weight gradients."""
    own, model, batches = shared_experts_of(case, True)
    pairs: list[list[str]] = []
    undo: list[Callable[[], None]] = []

    def noted(kind: type, method: str, does: Callable[[Any], bool]) -> None:
        original = getattr(kind, method)

        def called(self: Any, *arguments: Any) -> Any:
            if turns._RUNNING and does(self):
                pairs[-1].append(f"{'FB'[turns._RUNNING[0]._turn]} {method}")
            elif kind is Turns:
                pairs.append([])
            return original(self, *arguments)

        undo.append(functools.partial(setattr, kind, method, original))
        setattr(kind, method, called)

    noted(exchange.Trip, "there", lambda _: True)
    noted(exchange.Trip, "back", lambda _: True)
    noted(WeightGradients, "compute", lambda store: bool(store._later))
    noted(Turns, "run", lambda _: False)
    try:
        own.accumulate(batches, case.forward(model))
    finally:
        for put_back in undo:
            put_back()
    return pairs[0]


def test_the_order_within_a_pair_is_the_papers(run_ranks: Run) -> None:
    """Figure 4: rows of one direction travel while the other computes, weight gradients come when rows have left.

    Of two layers. Backward, "there" is the combine's gradients and "back" the dispatch's.
    """
    found = run_ranks(4, pair_events, Case(micro_batches=5), timeout=120)[2:]
    layer = ["F there", "B back", "B compute", "F back"]
    expected = ["B there", *layer, "B there", "B compute", *layer, "B compute"]
    assert found == [expected, expected]


def failing(rank: int, half: str) -> str:
    ran: list[str] = []

    def run(own: str) -> None:
        for i in range(3):
            ran.append(f"{own}{i}")
            turns.give_way()
            if own == half and i == 1:
                raise ValueError(f"{own} failed")

    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            Turns(WeightGradients()).run(lambda: run("F"), lambda: run("B"), thread)
        except ValueError as error:
            return f"{error}: {' '.join(ran)}"
        return " ".join(ran)


@pytest.mark.parametrize(
    ("half", "said"),
    [
        ("", "B0 F0 B1 F1 B2 F2"),
        ("F", "F failed: B0 F0 B1 F1 B2"),  # the other goes on to its end
        ("B", "B failed: B0 F0 B1 F1"),  # the other ends
    ],
)
def test_halves_of_a_pair_take_turns_and_a_failure_ends_both(half: str, said: str) -> None:
    assert failing(0, half) == said
    assert failing(0, "") == "B0 F0 B1 F1 B2 F2"


def test_each_half_of_a_pair_has_its_own_weight_gradients() -> None:
    """While one is open in a half, the other's products go to the other's."""
    later, own = WeightGradients(), WeightGradients()
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    outputs = []
    for store, weight in zip((later, own), weights, strict=True):
        with store:
            outputs.append(linear(torch.ones(1, 2), weight).sum())

    def half(store: WeightGradients, output: Tensor) -> None:
        assert not deferred.deferring()
        with store:
            turns.give_way()
            output.backward()
            turns.give_way()

    with ThreadPoolExecutor(max_workers=1) as thread:
        Turns(later).run(lambda: half(own, outputs[1]), lambda: half(later, outputs[0]), thread)
    assert torch.equal(weights[0].grad, torch.ones(2, 2)) and weights[1].grad is None
    own.compute()
    assert torch.equal(weights[1].grad, torch.ones(2, 2))


CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def only_rank(request: pytest.FixtureRequest) -> Iterator[tuple[torch.device, dist.ProcessGroup]]:
    """A group of this process alone."""
    backend = "gloo" if request.param == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield torch.device(request.param), dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("overlap", [False, True])
def test_both_stages_on_one_rank(
    only_rank: tuple[torch.device, dist.ProcessGroup], overlap: bool, precision: str
) -> None:
    """Halves and pairs without messages; to the bit on a CPU, and to rounding where a GPU adds in another order."""
    device, group = only_rank
    case = Case(micro_batches=4, precision=precision, dtype=torch.bfloat16 if precision == "fp8" else torch.float32)
    batches = [batch.to(device) for batch in case.parts()]
    batches[2] = dataclasses.replace(batches[2], sequences=0)  # is not counted
    model, loop = case.model(*case.stages(1, 0)).to(device), case.model().to(device)
    for network in (model, loop):
        experts.apply(network, exchange.Exchange([group], case.config.n_routed_experts))
    own = pipeline(case, Place(1, 0, (group, group)), model, overlap=overlap, device=device, trace=True)
    sums, counts = own.accumulate(batches, case.forward(model))
    expected, numbers = Part().accumulate(loop, batches, case.forward(loop))
    assert [len(span.step) for span in own.recorded].count(2) == (5 if overlap else 0)
    torch.testing.assert_close(sums, expected, rtol=1e-6 if device.type == "cpu" else 1e-3, atol=0)
    assert all(torch.equal(counts[layer], numbers[layer]) for layer in numbers)
    bound = 0.0 if device.type == "cpu" else {"bf16": 1e-4, "fp8": 2e-2}[precision]
    for name, gradient in gradients(loop).items():
        limit = max(bound, 1e-6 * (name == "embed_tokens.weight")) * gradient.norm()
        assert (gradients(model)[name] - gradient).norm() <= limit, name


# ---- order ----


def traced(rank: int, case: Case, out: Path) -> tuple[list[Span], list[list[Span]]]:
    here = place(rank, 4)
    model = case.model(*case.stages(4, here.rank))
    own = pipeline(case, here, model, trace=True)
    own.draw(out)  # nothing yet
    assert not out.exists()
    own.accumulate(case.parts(), case.forward(model))
    own.draw(out)
    return own.recorded, own.timeline()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_recorded_order_is_the_plans(run_ranks: Run, schedule: str, tmp_path: Path) -> None:
    """Every rank has the whole timeline afterwards, which is drawn beside the plan's."""
    case, plan = Case(schedule, micro_batches=8), build(schedule, 4, 8)
    out = tmp_path / "timeline.svg"
    found = run_ranks(4, traced, case, out, timeout=120)
    for (recorded, timeline), steps in zip(found, plan.steps, strict=True):
        assert [span.step for span in recorded] == [(action,) for step in steps for action in step]
        times = [time for span in recorded for time in span[1:]]
        assert times == sorted(times)
        assert timeline == found[0][1]
    begin = min(own[0].start for own, _ in found)
    assert timeline == [[Span(step, a - begin, b - begin) for step, a, b in own] for own, _ in found]
    made = {span.step[0]: span for span in (span for own in timeline for span in own)}
    after = [made[Action("F", s + 1, m)].start - made[Action("F", s, m)].end for s in range(3) for m in range(8)]
    assert min(after) >= 0  # one clock: none starts before the one that it waits for has ended
    picture, times = out.read_text(encoding="utf-8"), measured(timeline)
    assert f"as planned: {bubble(simulate(plan, times)):.1%}" in picture
    assert f"as run: {bubble(timeline):.1%}" in picture


def posted(rank: int, case: Case) -> dict[tuple[int, int], list[int]]:
    """The tags of each link's messages in the order in which this rank sent or posted them."""
    found: dict[tuple[int, int], list[int]] = {}
    send, receive = dist.isend, dist.irecv

    def isend(tensor: Tensor, *, group: Any, tag: int, group_dst: int) -> Any:
        found.setdefault((rank, group_dst), []).append(tag)
        return send(tensor, group=group, tag=tag, group_dst=group_dst)

    def irecv(tensor: Tensor, *, group: Any, tag: int, group_src: int) -> Any:
        found.setdefault((group_src, rank), []).append(tag)
        return receive(tensor, group=group, tag=tag, group_src=group_src)

    here = place(rank, 4)
    model = case.model(*case.stages(4, here.rank))
    try:
        dist.isend, dist.irecv = isend, irecv
        pipeline(case, here, model).accumulate(case.parts(), case.forward(model))
    finally:
        dist.isend, dist.irecv = send, receive
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_ends_of_a_link_take_one_order_pytorch_172668(run_ranks: Run, schedule: str) -> None:
    found = run_ranks(4, posted, Case(schedule, micro_batches=10), timeout=120)
    links = {link for own in found for link in own}
    assert links >= {(r, r + 1) for r in range(3)} | {(r + 1, r) for r in range(3)}
    for sender, receiver in links:
        sent = found[sender][sender, receiver]
        assert found[receiver][sender, receiver] == sent and len(set(sent)) == len(sent)


# ---- what is refused ----


def alone(schedule: str, ranks: int) -> Pipeline:
    nobody: Any = (None, None)
    return Pipeline(
        schedule, Place(ranks, 0, nobody), lookahead=1, width=32, dtype=torch.float32, device=torch.device("cpu")
    )


def nothing(batch: Batch, hidden: Tensor | None = None, stage: int = 0) -> Losses:
    raise AssertionError("nothing is to be computed")


def test_micro_batches_below_stages_torchtitan_775() -> None:
    with pytest.raises(ConfigError, match="dualpipev on 4 ranks needs at least 8 micro-batches, not 6"):
        alone("dualpipev", 4).accumulate([Batch(torch.zeros(2, 7, dtype=torch.int64), 12)] * 6, nothing)


def test_micro_batches_of_several_sizes_are_refused() -> None:
    parts = [Batch(torch.zeros(n, 7, dtype=torch.int64), 5) for n in (2, 2, 1)]
    with pytest.raises(ConfigError, match=r"of one size, not of 2, 2, 1 sequences: make train\.batch_size a multiple"):
        alone("1f1b", 2).accumulate(parts, nothing)
