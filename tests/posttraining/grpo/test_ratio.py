"""The headline: the trainer's log-probability of a sampled token has the bits that the sampler drew it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from leanseek import Transformer, fp8, native, ops
from leanseek.backends.protocol import trace
from leanseek.engine import Tokenizer
from leanseek.posttraining import forward
from leanseek.posttraining.forward import Scored, score
from leanseek.posttraining.policy import Policy
from leanseek.posttraining.rollouts import Completion, Rollouts, seed_of

PROMPTS = [list(range(5, 25)), [7, 8, 9], list(range(60, 77)), [11]]
BLOCKS = {
    "hidden_size": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "moe_intermediate_size": 128,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "drafts": {"speculate": 3},
    "alone": {"speculate": 0, "max_batch": 1, "prefix_cache": False},
    "chunks": {"speculate": 1, "step_tokens": 7, "page_size": 4},
}
ROOM = 2**24  # bytes for what rollouts go through


@pytest.fixture(params=["torch", *native.usable_variants()[:1]])
def path(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Which settings to try: in plain torch, which is slow, not all."""
    with ops.use("torch") if request.param == "torch" else native.use_variant(request.param):
        yield ["drafts"] if request.param == "torch" else list(SETTINGS)


def sample(
    rollouts: Rollouts, temperature: float = 1.0, choices: int = 3, step: int = 0, keep: bool = False
) -> list[list[Completion]]:
    seeds = [seed_of(3, step, number) for number in range(len(PROMPTS))]
    return rollouts.complete(PROMPTS, choices, 9, temperature, seeds, keep=keep)


def trained(policy: Policy, answers: Sequence[Sequence[Completion]], temperature: float) -> tuple[Scored, torch.Tensor]:
    """The policy's forward in training over all answers in one batch, and what the sampler said of the same tokens."""
    pairs = [(prompt, c) for prompt, group in zip(PROMPTS, answers, strict=True) for c in group]
    rows: list[int] = []
    lengths, end = [], 0
    for prompt, c in pairs:
        rows += range(end + len(prompt) - 1, end := end + len(prompt) + len(c.token_ids) - 1)
        lengths.append(len(prompt) + len(c.token_ids) - 1)
    tokens = torch.tensor([t for prompt, c in pairs for t in [*prompt, *c.token_ids][:-1]])
    targets = torch.tensor([t for _, c in pairs for t in c.token_ids])
    found = score(policy, tokens, lengths, torch.tensor(rows), targets, temperature)
    return found, torch.tensor([value for _, c in pairs for value in c.logprobs])


@pytest.mark.parametrize(
    ("arithmetic", "temperature"), [("float32", 0.6), ("float32", 1.0), ("bfloat16", 0.6), ("fp8", 1.0)]
)
def test_ratio_is_exactly_1(
    arithmetic: str, temperature: float, path: list[str], random_policy: Callable[..., Transformer]
) -> None:
    """trl#3029: at temperatures other than 1 too; with drafts, from the prefix cache, in any batch and in chunks."""
    model = random_policy(**(BLOCKS if arithmetic == "fp8" else {}))
    fp8.apply(model, "fp8" if arithmetic == "fp8" else "bf16")
    dtype = torch.float32 if arithmetic == "float32" else torch.bfloat16
    policy = Policy(model, dtype, "fp8" if arithmetic == "fp8" else "bf16")
    first = sample(Rollouts(policy, None, cache_gib=0.01, speculate=2), temperature)
    for name, options in {name: SETTINGS[name] for name in path}.items():
        rollouts = Rollouts(policy, None, cache_gib=0.01, **options)
        answers = sample(rollouts, temperature)
        again = sample(rollouts, temperature)  # from the prefix cache
        stats = rollouts.engine.stats()
        assert (sum(stats.accepted_tokens) > 0) == (name == "drafts") or name == "chunks"
        assert (stats.cached_tokens > 0) == (name != "alone")
        assert again == answers == first
    found, old = trained(policy, first, temperature)
    assert torch.equal(found.logp.detach(), old)
    assert ((found.logp - old).exp() == 1).all()


class Spy:
    """Counts the exact forwards of training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = 0
        monkeypatch.setattr(forward, "trace", self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return trace(*arguments)


def learned(policy: Policy, answers: Sequence[Sequence[Completion]], temperature: float) -> list[torch.Tensor]:
    """All that training takes from `score`, and the gradients."""
    policy.model.zero_grad()
    found, _ = trained(policy, answers, temperature)
    (found.logp * torch.linspace(-1, 1, len(found.logp))).sum().backward()
    gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
    return [found.logp.detach(), found.entropy, found.hidden, *(r.indices for r in found.routes), *gradients]


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "fp8"])
def test_what_rollouts_went_through_is_not_computed_again(
    arithmetic: str, path: list[str], random_policy: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing differs by it: with drafts that are refused, shared pages, parts of prompts, preempted sequences."""
    model = random_policy(**(BLOCKS if arithmetic == "fp8" else {}))
    precision = "fp8" if arithmetic == "fp8" else "bf16"
    fp8.apply(model, precision)
    dtype, spy = torch.float32 if arithmetic == "float32" else torch.bfloat16, Spy(monkeypatch)
    page = 4 * model.config.cache_width * dtype.itemsize * (model.config.num_hidden_layers + 1)  # bytes
    few = {"speculate": 2, "page_size": 4, "cache_gib": 15.5 * page / 2**30}
    for options in (few, *(SETTINGS[name] for name in path)):
        policy = Policy(model, dtype, precision, ROOM)
        rollouts = Rollouts(policy, None, **{"cache_gib": 0.01} | options)
        answers = sample(rollouts, 0.7, keep=True)
        assert bool(rollouts.engine.stats().preemptions) == (options is few)
        kept = learned(policy, answers, 0.7)
        assert spy.calls == 0
        computed = learned(Policy(model, dtype, precision), answers, 0.7)
        assert spy.calls == 1
        assert all(map(torch.equal, kept, computed)) and len(kept) == len(computed)
        spy.calls = 0


def test_other_rollouts_between(random_policy: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation on the same weights, whose pages hold what nobody has kept; and rollouts in two parts."""
    policy, spy = Policy(random_policy(), torch.float32, room=ROOM), Spy(monkeypatch)
    rollouts = Rollouts(policy, None, cache_gib=0.01)
    sample(rollouts, step=1)
    first = sample(rollouts, keep=True)
    second = sample(rollouts, step=2, keep=True)
    sample(rollouts, step=3)
    third = sample(rollouts, step=4, keep=True)
    for answers in (first, second, third):
        found, old = trained(policy, answers, 1.0)
        assert torch.equal(found.logp.detach(), old)
    assert spy.calls == 0
    trained(policy, sample(rollouts, step=5), 1.0)
    assert spy.calls == 1


def test_a_completion_that_a_string_ends(
    policy_folder: Path, random_policy: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, spy = Policy(random_policy(), torch.float32, room=ROOM), Spy(monkeypatch)
    rollouts = Rollouts(policy, Tokenizer(policy_folder), cache_gib=0.01)
    answers = rollouts.complete(PROMPTS, 4, 9, 1.0, range(4), stop=tuple("aeiou"), keep=True)
    assert 0 < sum(c.cut_off for group in answers for c in group) < 16
    found, old = trained(policy, answers, 1.0)
    assert torch.equal(found.logp.detach(), old) and spy.calls == 0


def test_a_step_that_failed(random_policy: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tries its sequences one by one; what was to come of the step is not taken for what came."""
    policy, spy = Policy(random_policy(), torch.float32, room=ROOM), Spy(monkeypatch)
    rollouts, steps = Rollouts(policy, None, cache_gib=0.01), 0
    inner = policy.recorder().backend.trace

    def failing(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (1, 8):
            raise MemoryError
        return inner(*arguments)

    monkeypatch.setattr(policy.recorder().backend, "trace", failing)
    answers = sample(rollouts, keep=True)
    found, old = trained(policy, answers, 1.0)
    assert torch.equal(found.logp.detach(), old) and spy.calls == 0 and steps > 8


@pytest.mark.parametrize("room", [0, 10_000])
def test_what_does_not_fit_is_computed(
    room: int, random_policy: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, spy = Policy(random_policy(), torch.float32, room=room), Spy(monkeypatch)
    answers = sample(Rollouts(policy, None, cache_gib=0.01), keep=True)
    found, old = trained(policy, answers, 1.0)
    assert torch.equal(found.logp.detach(), old) and spy.calls == 1


def test_the_log_probabilities_are_the_temperatures(random_policy: Callable[..., Transformer]) -> None:
    """trl#3029: log softmax(logits / T), to rounding what the plain network says."""
    model = random_policy()
    policy = Policy(model, torch.float32)
    answers = sample(Rollouts(policy, None, cache_gib=0.01), 0.6)
    with torch.no_grad():
        for prompt, group in zip(PROMPTS, answers, strict=True):
            for c in group:
                logits = model(torch.tensor([[*prompt, *c.token_ids]]))[0, len(prompt) - 1 : -1] / 0.6
                expected = logits.log_softmax(-1).gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_is_the_networks(tied: bool, random_policy: Callable[..., Transformer]) -> None:
    """In float32, to rounding that of the ordinary forward, for every parameter."""
    model = random_policy(num_nextn_predict_layers=0, tie_word_embeddings=tied)
    policy = Policy(model, torch.float32)
    answers = sample(Rollouts(policy, None, cache_gib=0.01), 0.7)
    found, _ = trained(policy, answers, 0.7)
    shares = torch.randn(len(found.logp))
    (found.logp * shares).sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    values = []
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for c in group:
            logits = model(torch.tensor([[*prompt, *c.token_ids]]))[0, len(prompt) - 1 : -1] / 0.7
            values.append(logits.log_softmax(-1).gather(1, torch.tensor(c.token_ids)[:, None])[:, 0])
    (torch.cat(values) * shares).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert (got[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_new_weights_reach_the_sampler(path: list[str], random_policy: Callable[..., Transformer]) -> None:
    """SkyRL#2246, trl#5312: after an update an engine says what a fresh one says, whatever it had cached."""
    model = random_policy()
    policy = Policy(model, torch.float32)
    rollouts = Rollouts(policy, None, cache_gib=0.01)
    before = sample(rollouts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(policy, before, 1.0)[0].logp.mean().backward()
    optimizer.step()
    torch.autograd.graph.increment_version(list(model.parameters()))  # as training's optimizer does
    after = sample(rollouts)
    assert after != before
    assert after == sample(Rollouts(Policy(model, torch.float32), None, cache_gib=0.01))
    found, old = trained(policy, after, 1.0)
    assert torch.equal(found.logp.detach(), old)


def test_a_moved_bias_reaches_the_sampler(random_policy: Callable[..., Transformer]) -> None:
    model = random_policy()
    policy = Policy(model, torch.float32)
    rollouts = Rollouts(policy, None, cache_gib=0.01)
    before = sample(rollouts)
    with torch.no_grad():
        model.layers[1].mlp.gate.e_score_correction_bias += torch.linspace(-0.5, 0.5, 8)  # type: ignore[union-attr, operator]
    after = sample(rollouts)
    assert [c.logprobs for group in after for c in group] != [c.logprobs for group in before for c in group]
    found, old = trained(policy, after, 1.0)
    assert torch.equal(found.logp.detach(), old)


def test_choices_have_seeds_of_their_own(random_policy: Callable[..., Transformer]) -> None:
    """ms-swift#3450: distinct in a group, the same again, others in another step."""
    rollouts = Rollouts(Policy(random_policy(), torch.float32), None, cache_gib=0.01)
    answers = sample(rollouts, choices=6)
    for group in answers:
        assert len({tuple(c.token_ids) for c in group}) == 6
    assert sample(rollouts, choices=6) == answers != sample(rollouts, choices=6, step=1)
    alone = rollouts.complete(PROMPTS[2:3], 6, 9, 1.0, [seed_of(3, 0, 2)])
    assert alone == answers[2:3]
    seeds = {seed_of(seed, step, prompt) for seed in range(8) for step in range(8) for prompt in range(8)}
    assert len(seeds) == 512
