"""The sampler draws from the distribution that its parameters describe, and from nothing else."""

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leanseek import Transformer
from leanseek.engine import Request, SamplingParams
from leanseek.engine.params import MAX_LOGPROBS
from leanseek.engine.penalties import Penalties
from leanseek.engine.sampler import Choice, choose, logprobs_of
from leanseek.engine.sequence import mix

DRAWS = 20000


def draw(logits: Tensor, params: SamplingParams, draws: int = DRAWS) -> Tensor:
    """Counts [V] of tokens drawn from one row of logits, under as many keys."""
    keys = [mix(7, i) for i in range(draws)]
    choice = Choice.of([params] * draws, keys, len(logits), torch.device("cpu"))
    return torch.bincount(choose(logits.expand(draws, -1), choice), minlength=len(logits))


def wanted(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution written out as vLLM documents it, one row, plainly."""
    p = (logits.double() / params.temperature).softmax(-1)
    order = p.argsort(descending=True)
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    if params.top_p < 1:
        before = p[order].cumsum(0) - p[order]
        p[order[before >= params.top_p]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def chi_square_is_plausible(counts: Tensor, p: Tensor) -> bool:
    """Pearson's statistic within 5 standard deviations of its mean; no draw where p is 0. Rare tokens are pooled."""
    assert not counts[p == 0].any()
    expected = p * counts.sum()
    rare = expected < 10
    observed = torch.cat((counts[~rare].double(), counts[rare].sum()[None].double()))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).clamp_min(1e-9)
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    freedom = max(1, int((~rare).sum()))
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("vocab", [7, 64, 500])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.99, "temperature": 2.0},
        {"min_p": 0.1},
        {"top_k": 100, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(vocab: int, params: dict[str, Any], in_crowds: None) -> None:
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    settings = SamplingParams(**params)
    assert chi_square_is_plausible(draw(logits, settings), wanted(logits, settings))


def test_a_flat_distribution_reaches_past_the_candidates(in_crowds: None) -> None:
    """500 equal tokens, of which only 64 race one by one."""
    settings = SamplingParams(temperature=1.0)
    counts = draw(torch.zeros(500), settings, 50000)
    assert chi_square_is_plausible(counts, torch.full((500,), 1 / 500, dtype=torch.float64))


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((300,), -math.inf)
    logits[[5, 17]] = torch.tensor([0.0, 1.0])
    counts = draw(logits, SamplingParams(temperature=5.0), 2000)
    assert counts.nonzero().flatten().tolist() == [5, 17]


def test_rows_of_a_batch_have_their_own_parameters() -> None:
    """A mixed batch gives each row what it gets alone."""
    rows = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=0.7, top_p=0.5),
        SamplingParams(temperature=2.0, min_p=0.5),
        SamplingParams(temperature=4.0, top_p=0.999),
    ]
    logits = torch.randn(len(rows), 400, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    for seed in range(50):
        keys = [mix(seed, i) for i in range(len(rows))]
        together = choose(logits, Choice.of(rows, keys, 400, cpu))
        for i, params in enumerate(rows):
            alone = choose(logits[i : i + 1], Choice.of([params], [keys[i]], 400, cpu))
            assert together[i] == alone[0]
        assert together[0] == logits[0].argmax()
        assert together[2] == logits[2].argmax()


def test_logprobs_are_of_the_raw_logits_in_descending_order() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([4, 5, 6])
    exact = logits.log_softmax(-1)
    for row, entry in enumerate(logprobs_of(logits, tokens, 5)):
        assert entry.token_id == tokens[row]
        assert entry.logprob == pytest.approx(exact[row, tokens[row]].item())
        values, ids = exact[row].topk(5)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist())


# ---- through the engine ----


def run(engine: Any, prompt: list[int], params: SamplingParams) -> list:
    engine.add(Request("r", prompt, params))
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    return deltas


def tokens_of(deltas: list) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def penalised_greedy(model: Transformer, prompt: list[int], params: SamplingParams) -> list[int]:
    """Greedy under penalties, plainly, by the whole forward."""
    tokens = list(prompt)
    for _ in range(params.max_tokens or 0):
        logits = model(torch.tensor([tokens]))[0, -1].clone()
        for token in set(tokens):
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        output = tokens[len(prompt) :]
        if len(output) < params.min_tokens:
            logits[list(params.stop_token_ids or ())] = -math.inf
        for token in set(output):
            logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        tokens.append(int(logits.argmax()))
        if tokens[-1] in (params.stop_token_ids or ()):
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"logit_bias": {7: 100.0}},
        {"logit_bias": {7: 6.0, 9: -100.0}, "repetition_penalty": 1.3, "frequency_penalty": 1.0},
        {"frequency_penalty": -0.5, "presence_penalty": 1.0},
        {"min_tokens": 8, "stop_token_ids": [7], "logit_bias": {7: 6.0}},
        {"min_tokens": 8, "stop_token_ids": list(range(100, 320)), "frequency_penalty": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("drafts", [0, 2])
def test_penalties(drafting_model: Transformer, make_engine: Callable, penalties: dict[str, Any], drafts: int) -> None:
    """With and without drafts: a draft's row counts the drafts before it as output."""
    params = SamplingParams(temperature=0, max_tokens=24, **penalties)
    prompt = list(range(2, 20))
    ours = tokens_of(run(make_engine(drafting_model, speculate=drafts), prompt, params))
    assert ours == penalised_greedy(drafting_model, prompt, params)


def test_penalties_with_choices_and_preemption(
    drafting_model: Transformer, make_engine: Callable, cache_gib: Callable, serve: Callable
) -> None:
    """Each choice counts its own tokens, and once only although they are computed again."""
    params = SamplingParams(seed=4, n=2, max_tokens=40, repetition_penalty=1.2, frequency_penalty=0.7, ignore_eos=True)
    prompts = [[5, 6, 7], [8] * 20, [9, 10]]
    alone = [tokens for p in prompts for tokens in serve(make_engine(drafting_model), [p], params)]
    engine = make_engine(drafting_model, cache_gib=cache_gib(130))
    assert serve(engine, prompts, params) == alone
    assert engine.stats().preemptions


@pytest.mark.parametrize("seed", range(4))
def test_running_counts_equal_a_count_from_scratch(seed: int) -> None:
    """Tokens that grow by some and drafts that are taken back, over few distinct ids, some of them biased or ends."""
    choose = random.Random(seed)
    ids = range(12)
    params = SamplingParams(
        repetition_penalty=choose.choice([1.0, 1.5]),
        presence_penalty=choose.choice([0.0, 0.75]),
        frequency_penalty=choose.choice([0.0, -0.5]),
        logit_bias={3: 2.0, 11: -1.0} if seed % 2 else None,
        min_tokens=6,
        max_tokens=None,
    )
    prompt, ends = choose.choices(ids, k=5), {2, 3}
    penalties, tokens = Penalties(params, prompt, ends), list(prompt)
    for _ in range(30):
        drafts = choose.choices(ids, k=choose.randrange(4))
        for offset, (seen, places, values) in enumerate(penalties.rows(tokens, drafts)):
            now = [*tokens, *drafts[:offset]]
            output = Counter(now[len(prompt) :])
            assert sorted(seen.tolist()) == (sorted(set(now)) if params.repetition_penalty != 1 else [])
            expected = np.zeros(12)
            for token, bias in (params.logit_bias or {}).items():
                expected[token] += bias
            for token, count in output.items():
                expected[token] -= params.presence_penalty + params.frequency_penalty * count
            if sum(output.values()) < params.min_tokens:
                expected[list(ends)] = -math.inf
            found = np.zeros(12)
            assert len(set(places.tolist())) == len(places)
            found[places] = values
            assert found.tolist() == expected.tolist()
        tokens += choose.choices(ids, k=choose.randrange(1, 4))


def test_prompt_logprobs(model: Transformer, make_engine: Callable) -> None:
    """Whatever the chunks, and although the prompt is in the prefix cache."""
    prompt = list(range(2, 150))
    exact = model(torch.tensor([prompt]))[0].log_softmax(-1)
    for chunk in (512, 20):
        engine = make_engine(model, step_tokens=chunk)
        run(engine, prompt, SamplingParams(max_tokens=1))
        deltas = run(engine, prompt, SamplingParams(max_tokens=2, prompt_logprobs=3, logprobs=0))
        scores = deltas[0].prompt_logprobs
        assert scores is not None
        assert scores[0] is None
        assert len(scores) == len(prompt)
        for place, entry in enumerate(scores[1:], start=1):
            assert entry is not None
            assert entry.token_id == prompt[place]
            assert entry.logprob == pytest.approx(exact[place - 1, prompt[place]].item(), abs=1e-4)
            assert [token for token, _ in entry.top] == exact[place - 1].topk(3).indices.tolist()
        assert deltas[0].logprobs is not None
        assert deltas[0].logprobs[0].top == []


def test_choices_with_a_seed_differ_and_repeat(model: Transformer, make_engine: Callable) -> None:
    params = SamplingParams(n=4, temperature=2.0, seed=5, max_tokens=8)

    def choices() -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(4)]
        for delta in run(make_engine(model), [3, 4, 5], params):
            found[delta.index] += delta.token_ids
        return found

    first = choices()
    assert first == choices()
    assert len({tuple(choice) for choice in first}) == 4


def test_requests_without_a_seed_differ(model: Transformer, make_engine: Callable) -> None:
    engine = make_engine(model, seed=None)
    params = SamplingParams(temperature=2.0, max_tokens=12)
    assert tokens_of(run(engine, [3, 4, 5], params)) != tokens_of(run(engine, [3, 4, 5], params))


def test_limits_are_those_of_the_api() -> None:
    assert SamplingParams(logprobs=MAX_LOGPROBS).logprobs == 20
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
