"""MTP drafts change the speed and nothing else: not greedy tokens, not sampled ones, not their distribution."""

import math
from collections.abc import Callable

import pytest
import torch

from leanseek import Transformer
from leanseek.engine import Engine, Request, SamplingParams
from leanseek.engine.sequence import Sequence
from leanseek.engine.speculation import EXPLORE_EVERY, PLAIN_STEPS, PROBE_EVERY, TRIALS, TRY_EVERY, Speculation

GREEDY = SamplingParams(temperature=0, max_tokens=60)


@pytest.fixture
def undeterred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step drafts as far as allowed, whatever that costs on this machine."""
    monkeypatch.setattr(Speculation, "_depth", lambda self, sequence, cost: self.drafts)
    monkeypatch.setattr(Speculation, "probes", lambda self, batch: False)


@pytest.mark.usefixtures("undeterred")
@pytest.mark.parametrize("drafts", [1, 2, 4])
@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(temperature=0.8, seed=3, max_tokens=60), SamplingParams(seed=3, top_k=8, max_tokens=60)],
    ids=["greedy", "sampled", "top_k"],
)
def test_tokens_are_those_without_drafts_in_fewer_steps(
    drafting_model: Transformer,
    make_engine: Callable,
    serve: Callable,
    drafts: int,
    params: SamplingParams,
) -> None:
    prompts = [list(range(2, 30)), [5], list(range(60, 75))]
    without, with_drafts = make_engine(drafting_model, speculate=0), make_engine(drafting_model, speculate=drafts)
    assert serve(with_drafts, prompts, params) == serve(without, prompts, params)
    stats = with_drafts.stats()
    assert stats.steps < 0.8 * without.stats().steps
    assert len(stats.draft_tokens) == len(stats.accepted_tokens) == drafts
    assert all(0 < kept <= made for kept, made in zip(stats.accepted_tokens, stats.draft_tokens, strict=True))
    assert sorted(stats.accepted_tokens, reverse=True) == stats.accepted_tokens  # a draft stands on those before it


@pytest.mark.usefixtures("in_crowds")
def test_sampling_with_drafts_follows_the_models_distribution(make_model: Callable, make_engine: Callable) -> None:
    """Chi-square over the pairs of tokens 2 and 3 after a prompt, against the whole forward's exact probabilities.

    A vocabulary of 6; three drafts, wrong often enough that both acceptance and rejection count.
    """
    model = make_model(seed=2, vocab_size=6, initializer_range=0.2)
    prompt, count = [1, 2, 3], 4000
    engine = make_engine(model, speculate=3, max_batch=256)
    for i in range(count):
        engine.add(Request(str(i), prompt, SamplingParams(max_tokens=3, seed=i)))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(count)}
    while engine.has_work():
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    made, kept = engine.stats().draft_tokens[0], engine.stats().accepted_tokens[0]
    assert 0.05 < kept / made < 0.95
    observed = torch.zeros(6, 6, 6)
    for a, b, c in tokens.values():
        observed[a, b, c] += 1
    every = torch.cartesian_prod(*[torch.arange(6)] * 3)
    log_p = model(torch.cat((torch.tensor(prompt).expand(216, -1), every), dim=1)).log_softmax(-1)[:, 2:5]
    p = log_p.gather(2, every[..., None]).sum((1, 2)).exp().view(6, 6, 6)
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    expected = count * p
    common = expected >= 5
    statistic = ((observed - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum()) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.usefixtures("undeterred")
def test_usage_counts_drafts(drafting_model: Transformer, make_engine: Callable) -> None:
    engine = make_engine(drafting_model, speculate=2)
    engine.add(Request("r", list(range(2, 30)), GREEDY))
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    usage = deltas[-1].usage
    assert usage is not None
    assert usage.draft_tokens == sum(engine.stats().draft_tokens)
    assert usage.accepted_tokens == sum(engine.stats().accepted_tokens)
    assert usage.completion_tokens == 60
    assert max(len(delta.token_ids) for delta in deltas) == 3  # two drafts and one more


# ---- when it pays ----


@pytest.fixture
def sequence(drafting_model: Transformer, make_engine: Callable) -> Sequence:
    engine: Engine = make_engine(drafting_model)
    engine.add(Request("r", [2, 3], GREEDY))
    return engine._scheduler.waiting[0]


def measured(drafts: int, cost_of_a_draft: float) -> Speculation:
    """A policy to which a step without drafts takes 1 s, and each draft so much more."""
    policy = Speculation(drafts)
    for _ in range(PLAIN_STEPS):
        policy.measured(1, verified=0, seconds=1.2, draft_seconds=0.2)
    policy.measured(1, verified=drafts, seconds=1.0 + drafts * cost_of_a_draft, draft_seconds=0.2)
    return policy


@pytest.mark.parametrize(
    ("kept", "cost", "pays"),
    [(1, 0.5, True), (0, 0.5, False), (1, 1.5, False), (0, -0.1, True)],
    ids=["right and cheap", "wrong", "right but dear", "wrong but free"],
)
def test_a_request_drafts_while_its_gain_outweighs_the_cost(
    sequence: Sequence, kept: int, cost: float, pays: bool
) -> None:
    policy = measured(1, cost)
    policy.begin(sequence, batch=1)
    for _ in range(TRIALS):
        assert sequence.depth == 1
        sequence.drafts = [7]
        policy.judge(sequence, accepted=kept, batch=1)
    assert sequence.depth == pays


def test_a_request_drafts_as_far_as_its_drafts_are_right(sequence: Sequence) -> None:
    """The first two of three are always kept and the third never: two, but for a look at the third now and then."""
    policy = measured(3, 0.3)
    policy.begin(sequence, batch=1)
    depths = []
    for _ in range(3 * EXPLORE_EVERY):
        sequence.drafts = [7] * sequence.depth
        policy.judge(sequence, accepted=min(2, sequence.depth), batch=1)
        depths.append(sequence.depth)
    assert depths.count(3) >= 2
    assert set(depths[EXPLORE_EVERY:]) == {2, 3}
    assert depths[EXPLORE_EVERY:].count(3) == 2
    assert policy.accepted[2] == 0 < policy.proposed[2]


def test_requests_do_not_try_what_did_not_pay_for_others(sequence: Sequence) -> None:
    """One in TRY_EVERY does, so that a change is seen."""
    policy = measured(1, 0.5)
    policy.begin(sequence, batch=1)
    for _ in range(TRIALS):
        sequence.drafts = [7]
        policy.judge(sequence, accepted=0, batch=1)
    depths = []
    for _ in range(2 * TRY_EVERY):
        policy.begin(sequence, batch=1)
        depths.append(sequence.depth)
    assert depths.count(1) == 2
    policy.begin(sequence, batch=2)
    assert sequence.depth == 1, "another batch size has its own cost"


def test_one_interrupted_step_does_not_make_drafts_dear(sequence: Sequence) -> None:
    policy = measured(1, 0.3)
    policy.begin(sequence, batch=1)
    for seconds in (1.3, 1.3, 60.0):
        policy.measured(1, verified=1, seconds=seconds, draft_seconds=0.1)
    for _ in range(TRIALS):
        sequence.drafts = [7]
        policy.judge(sequence, accepted=1, batch=1)
    assert sequence.depth == 1


def test_the_cost_without_drafts_is_measured_first_and_now_and_then() -> None:
    policy = Speculation(1)
    for _ in range(PLAIN_STEPS):
        assert policy.probes(1)
        policy.measured(1, verified=0, seconds=1.0, draft_seconds=0.0)
    probes = 0
    for _ in range(2 * PROBE_EVERY):
        probes += policy.probes(1)
        policy.measured(1, verified=1, seconds=1.7, draft_seconds=0.2)
    assert probes == 2
    assert policy.probes(2), "another batch size has its own cost"
    assert not Speculation(0).probes(1)


def test_a_request_whose_drafts_are_wrong_stops_drafting(
    model: Transformer, make_engine: Callable, serve: Callable
) -> None:
    """A random MTP module is never right: after some trials the engine runs as without it, tokens unchanged."""
    params = SamplingParams(temperature=0, max_tokens=120)
    engine = make_engine(model, speculate=1)
    expected = serve(make_engine(model, speculate=0), [[2, 3, 4]], params)
    assert serve(engine, [[2, 3, 4]], params) == expected
    assert engine.stats().draft_tokens[0] < 100
