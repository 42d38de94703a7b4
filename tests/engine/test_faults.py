"""What goes wrong in one request ends that request alone; what a request leaves behind is nothing."""

from collections.abc import Callable
from typing import Any

import pytest

from leanseek import Transformer
from leanseek.engine import Delta, Engine, Request, SamplingParams, Tokenizer
from leanseek.engine.runner import Runner
from leanseek.engine.sampler import Rows
from leanseek.engine.tokenizer import TextStream

PARAMS = SamplingParams(temperature=0, max_tokens=12)
NAMES = ("a", "b", "c")


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
