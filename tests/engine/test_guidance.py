"""Guided output has its form, with and without drafts, and a form that cannot be is refused."""

import json
import re
from collections.abc import Callable

import pytest

from leanseek import Transformer
from leanseek.engine import EngineError, Guide, Request, SamplingParams, Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def text_of(engine, params: SamplingParams) -> tuple[str, str | None]:  # type: ignore[no-untyped-def]
    engine.add(Request("r", [10, 11, 12], params))
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    assert deltas[-1].error is None
    return "".join(delta.text for delta in deltas), deltas[-1].finish_reason


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("temperature", [0, 2.0])
@pytest.mark.parametrize(
    ("guide", "fits"),
    [
        (Guide.regex(r"[0-9]{3}-[a-f]{2}"), lambda text: re.fullmatch(r"[0-9]{3}-[a-f]{2}", text)),
        (Guide.choice(["yes", "no", 'say "é"']), lambda text: text in ("yes", "no", 'say "é"')),
        (Guide.grammar('start: "a" NUMBER "z"\nNUMBER: /[0-9]{1,4}/'), lambda text: re.fullmatch(r"a\d{1,4}z", text)),
        (Guide.json_schema(SCHEMA), lambda text: sorted(json.loads(text)) == ["age", "name"]),
    ],
    ids=["regex", "choice", "grammar", "json"],
)
def test_output_has_its_form(
    drafting_model: Transformer,
    make_engine: Callable,
    tokenizer: Tokenizer,
    guide: Guide,
    fits: Callable[[str], object],
    temperature: float,
    drafts: int,
) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=200, guided=guide)
    text, reason = text_of(make_engine(drafting_model, tokenizer, speculate=drafts, eos_token_ids=[0]), params)
    assert reason == "stop"
    assert fits(text), text
    without = text_of(make_engine(drafting_model, tokenizer, speculate=0, eos_token_ids=[0]), params)
    assert without[0] == text


def test_choices_have_their_own_place_in_the_grammar(
    model: Transformer, make_engine: Callable, tokenizer: Tokenizer
) -> None:
    engine = make_engine(model, tokenizer, eos_token_ids=[0])
    params = SamplingParams(n=6, temperature=3.0, seed=1, max_tokens=50, guided=Guide.regex("[ab]{5}"))
    engine.add(Request("r", [10, 11], params))
    texts = [""] * 6
    while engine.has_work():
        for delta in engine.step():
            texts[delta.index] += delta.text
    assert all(re.fullmatch("[ab]{5}", text) for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    "guide",
    [Guide.regex("("), Guide.json_schema("{"), Guide.json_schema({"type": "nope"}), Guide.grammar("start: nothing")],
    ids=["regex", "json", "schema", "grammar"],
)
def test_a_form_that_cannot_be_is_refused(
    model: Transformer, make_engine: Callable, tokenizer: Tokenizer, guide: Guide
) -> None:
    engine = make_engine(model, tokenizer)
    for refuse in (
        lambda prompt, params: engine.matcher(params),
        lambda prompt, params: engine.add(Request("r", prompt, params)),
    ):
        with pytest.raises(EngineError, match="guided") as caught:
            refuse([1, 2], SamplingParams(guided=guide))
        assert "\n" not in str(caught.value)
    assert not engine.has_work()
