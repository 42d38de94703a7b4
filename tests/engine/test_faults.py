"""What goes wrong in one request ends that request alone; what a request leaves behind is nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from leanseek import Transformer, native, ops
from leanseek.engine import Delta, Engine, Request, SamplingParams, Tokenizer
from leanseek.engine.runner import Runner
from leanseek.engine.sampler import Rows
from leanseek.engine.tokenizer import TextStream

PARAMS = SamplingParams(temperature=0, max_tokens=12)
NAMES = ("a", "b", "c")
PATHS = ["native", "torch"] if native.usable_variants() else ["torch"]


def run_all(engine: Engine) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = {name: [] for name in NAMES}
    while engine.has_work():
        for delta in engine.step():
            found[delta.request_id].append(delta)
        engine.check_invariants()
    return found


def check_only_b_failed(engine: Engine, expected: dict[str, list[Delta]]) -> None:
    found = run_all(engine)
    assert found["b"][-1].finish_reason == "error"
    assert "bad luck" in (found["b"][-1].error or "")
    for name in ("a", "c"):
        tokens = [token for delta in found[name] for token in delta.token_ids]
        assert tokens == [token for delta in expected[name] for token in delta.token_ids]
        assert found[name][-1].finish_reason == "length"
    assert engine.stats().finished == {"length": 2, "error": 1}
    assert engine.stats().pages_used == 0


def start(engine: Engine) -> Engine:
    for i, name in enumerate(NAMES):
        engine.add(Request(name, list(range(2, 20 + i)), PARAMS))
    return engine


@pytest.mark.parametrize("place", ["sampler", "model", "text"])
def test_an_exception_in_one_request_ends_it_alone(
    model: Transformer,
    make_engine: Callable,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    healthy, engine = start(make_engine(model, tokenizer)), start(make_engine(model, tokenizer))
    for _ in range(2):
        healthy.step()
        engine.step()
    expected = run_all(healthy)
    if place == "sampler":
        add = Rows.add

        def bad_add(self: Rows, sequence) -> None:  # type: ignore[no-untyped-def]
            if sequence.request.request_id == "b":
                raise ZeroDivisionError("bad luck")
            add(self, sequence)

        monkeypatch.setattr(Rows, "add", bad_add)
    elif place == "model":
        run = Runner.run

        def bad_run(self: Runner, works, rows):  # type: ignore[no-untyped-def]
            if any(work.sequence.request.request_id == "b" for work in works):
                raise MemoryError("bad luck")
            return run(self, works, rows)

        monkeypatch.setattr(Runner, "run", bad_run)
    else:
        sequence = next(s for s in engine._scheduler.running if s.request.request_id == "b")
        add_text = TextStream.add

        def bad_text(self: TextStream, *given: Any) -> str | None:
            if self is sequence.text:
                raise ValueError("bad luck")
            return add_text(self, *given)

        monkeypatch.setattr(TextStream, "add", bad_text)
    check_only_b_failed(engine, expected)


def test_abort_frees_pages_at_once(model: Transformer, make_engine: Callable) -> None:
    engine = start(make_engine(model, prefix_cache=False))
    engine.step()
    used = engine.stats().pages_used
    engine.abort("b")
    engine.abort("b")
    engine.abort("never heard of")
    assert engine.stats().pages_used < used
    engine.check_invariants()
    found = run_all(engine)
    assert [delta.finish_reason for delta in found["b"]] == ["abort"]
    assert found["a"][-1].finish_reason == "length"


def test_abort_of_a_request_that_waits(model: Transformer, make_engine: Callable) -> None:
    engine = start(make_engine(model, max_batch=1))
    engine.abort("c")
    found = run_all(engine)
    assert [delta.finish_reason for delta in found["c"]] == ["abort"]
    assert engine.stats().finished == {"length": 2, "abort": 1}


def test_the_check_finds_a_lost_sequence(model: Transformer, make_engine: Callable) -> None:
    engine = start(make_engine(model))
    engine.step()
    engine._scheduler.running.pop()
    with pytest.raises(AssertionError):
        engine.check_invariants()


# ---- a model that is not finite ----


def spoilt(make_model: Callable[..., Transformer], name: str, rows: slice, value: float) -> Transformer:
    model = make_model()
    model.get_parameter(name)[rows] = value
    return model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("params", "drafts"),
    [
        (PARAMS, 0),
        (PARAMS, 2),
        (SamplingParams(max_tokens=12, top_p=0.9, seed=1), 0),
        (SamplingParams(max_tokens=12, logprobs=3, logit_bias={5: 50.0}, repetition_penalty=1.3), 1),
    ],
)
def test_a_token_that_is_not_finite_ends_only_requests_that_hold_it(
    make_model: Callable, make_engine: Callable, params: SamplingParams, drafts: int, path: str
) -> None:
    """One plain error, in a shared batch, over pages that it leaves full of NaN."""
    with ops.use(path):
        engine = make_engine(spoilt(make_model, "embed_tokens.weight", slice(300, 301), torch.nan), speculate=drafts)
        engine.add(Request("warm", [300] * 40, PARAMS))
        found = {"warm": [], "a": [], "b": [], "c": []}  # type: ignore[var-annotated]
        while engine.has_work():
            found["warm"] += engine.step()
        for name, prompt in (("a", [2, 3, 4]), ("b", [7, 300, 9]), ("c", list(range(9, 60)))):
            engine.add(Request(name, prompt, params))
        while engine.has_work():
            for delta in engine.step():
                found[delta.request_id].append(delta)
            engine.check_invariants()
    for name in ("warm", "b"):
        (delta,) = found[name]
        assert delta.finish_reason == "error" and not delta.token_ids
        assert (delta.error or "").startswith("the model's logits are not finite")
    assert [found[name][-1].finish_reason for name in ("a", "c")] == ["length", "length"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_head_that_is_not_finite_ends_every_request(
    make_model: Callable, make_engine: Callable, value: float, path: str
) -> None:
    """Hidden by a mask or not; a prompt's log-probabilities too, which nothing samples from."""
    with ops.use(path):
        engine = make_engine(spoilt(make_model, "lm_head.weight", slice(9, 10), value))
        masked = SamplingParams(max_tokens=4, logit_bias={9: -100.0}, min_tokens=2, stop_token_ids=[9])
        scored = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=2)
        for name, params in (("a", masked), ("b", scored)):
            engine.add(Request(name, [2, 3, 4], params))
        deltas = []
        while engine.has_work():
            deltas += engine.step()
    assert {delta.request_id for delta in deltas} == {"a", "b"}
    assert all(delta.error and "not finite" in delta.error for delta in deltas)
    assert not any(delta.logprobs or delta.prompt_logprobs for delta in deltas)


@pytest.mark.parametrize("path", PATHS)
def test_the_request_that_ended_servers(model: Transformer, make_engine: Callable, serve: Callable, path: str) -> None:
    """At the ends of what is allowed, logits stay numbers and weights lie in [0, 1]."""
    wild = [
        SamplingParams(
            max_tokens=20, min_tokens=20, stop_token_ids=[8], top_p=1e-6, logit_bias={0: 100.0, 1: -100.0}, seed=1,
            repetition_penalty=penalty, temperature=temperature, presence_penalty=-2.0, frequency_penalty=-2.0,
        )
        for penalty in (0.01, 100.0) for temperature in (1e-6, 1e-5, 100.0)
    ]  # fmt: skip
    with ops.use(path):
        answers = serve(make_engine(model), [[8]] * len(wild), wild)
    assert all(len(answer) == 20 and 8 not in answer for answer in answers)
