"""Guided output has its form, with and without drafts, and a form that cannot be is refused."""

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from leanseek import Transformer
from leanseek.engine import EngineError, Guide, Request, SamplingParams, Tokenizer, guidance, guide_worker

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
) -> None:
    """The same text with drafts and without."""
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=200, guided=guide)
    text, reason = text_of(make_engine(drafting_model, tokenizer, speculate=2, eos_token_ids=[0]), params)
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
    engine = make_engine(model, tokenizer, eos_token_ids=[0])
    for refuse in (
        lambda prompt, params: engine.matcher(params),
        lambda prompt, params: engine.add(Request("r", prompt, params)),
    ):
        with pytest.raises(EngineError, match="guided") as caught:
            refuse([1, 2], SamplingParams(guided=guide))
        assert "\n" not in str(caught.value)
    assert not engine.has_work()


@pytest.fixture(scope="module")
def spelled(tokenizer: Tokenizer) -> str:
    """The text of an added token."""
    return tokenizer.token_bytes(tokenizer.added_ids[0]).decode()


@pytest.mark.parametrize(
    ("guide", "fits"),
    [
        (lambda text: Guide.regex(re.escape(text) + "[a-c]{2}"), lambda out, text: out[:-2] == text),
        (lambda text: Guide.choice([text]), lambda out, text: out == text),
        (lambda text: Guide.json_schema({"const": text}), lambda out, text: json.loads(out) == text),
        (lambda text: Guide.json_schema({"enum": [text]}), lambda out, text: json.loads(out) == text),
        (
            lambda text: Guide.json_schema(
                {
                    "type": "object",
                    "properties": {text: {"const": 1}},
                    "required": [text],
                    "additionalProperties": False,
                }
            ),
            lambda out, text: json.loads(out) == {text: 1},
        ),
    ],
    ids=["regex", "choice", "const", "enum", "property"],
)
def test_the_text_of_an_added_token_is_written_in_ordinary_ones(
    model: Transformer, make_engine: Callable, tokenizer: Tokenizer, spelled: str, guide: Callable, fits: Callable
) -> None:
    """Its own id would be read as a mark, or as the end."""
    engine = make_engine(model, tokenizer, eos_token_ids=[tokenizer.added_ids[0]])
    params = SamplingParams(temperature=0, max_tokens=120, guided=guide(spelled))
    engine.add(Request("r", [10, 11], params))
    text, ids = "", []
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            text += delta.text
            ids += delta.token_ids
    assert fits(text, spelled), text
    assert not {*ids[:-1]} & {*tokenizer.added_ids}


def chain(length: int) -> str:
    rules = "\n".join(f'r{i}: "a" r{i + 1} | "b"' for i in range(length))
    return f'start: r0\n{rules}\nr{length}: "x"'


@pytest.mark.parametrize(
    "guide",
    [
        Guide.grammar(chain(2500)),  # so deep that llguidance runs out of stack
        Guide.choice([f"choice number {i}" for i in range(20_000)]),
        Guide.json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}),
        Guide.regex("a" * 70_000),
        Guide.grammar("start: <[99999999]>"),
        Guide.grammar("start: <nope>"),
        Guide.regex(r"[^\s\S]"),
        Guide.regex("(" * 1000 + "a" + ")" * 1000),
        Guide.json_schema({"allOf": [{"anyOf": [{"minimum": i}, {"maximum": i}]} for i in range(30)]}),
        Guide.json_schema({"type": "string", "pattern": "^(a|b){0,2000}$", "format": "email", "minLength": 100}),
        # these compile, and would fail at their first steps
        Guide.regex("a{1000000}"),
        Guide.json_schema({"type": "array", "items": {"type": "string", "pattern": "^a{1000000}$"}, "minItems": 1}),
        Guide.json_schema(
            {
                "type": "object",
                "properties": {"a": {"type": "string"}, "b": {"type": "string", "pattern": "^a{1000000}$"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            }
        ),
        Guide.grammar('start: x{1000000}\nx: "a"'),
        Guide.choice([f"w{i}" for i in range(5000)]),
    ],
)
def test_a_guide_that_takes_too_much_is_one_line(
    model: Transformer, make_engine: Callable, tokenizer: Tokenizer, guide: Guide
) -> None:
    engine = make_engine(model, tokenizer, eos_token_ids=[0])
    with pytest.raises(EngineError, match=f"^guided {guide.kind}: ") as caught:
        engine.matcher(SamplingParams(guided=guide))
    told = str(caught.value)
    assert "\n" not in told and len(told) < 300
    assert engine.matcher(SamplingParams(guided=Guide.regex("a"))), "the next is compiled"


@pytest.mark.parametrize(
    ("guide", "told"),
    [
        (Guide.regex("a("), "not a valid regular expression: unclosed group"),
        (
            Guide.regex("(?=a)b"),
            "not a valid regular expression: look-around, including look-ahead and look-behind, is not supported",
        ),
        (Guide.regex(r"a\b"), r"not a valid regular expression: ^, $ and \b inside it are not supported"),
        (Guide.json_schema("{"), "the schema is not JSON"),
        (Guide.json_schema("[]"), "a schema must be an object"),
        (Guide.json_schema({"items": 5}), "a schema must be an object or a boolean"),
        (Guide.json_schema({"type": "nope\x1b[31m"}), "there is no type nope�[31m"),
        (Guide.json_schema({"type": "string", "format": "nope"}), "the format nope is not supported"),
        (Guide.json_schema({"type": "string", "minLength": -1}), "minLength must be a whole number of at least 0"),
        (Guide.json_schema({"type": "integer", "minimum": 10**30}), "a bound or multipleOf has too many digits"),
        (Guide.json_schema({"type": "number", "minimum": "x"}), "minimum must be a number"),
        (Guide.json_schema({"type": "integer", "minimum": 2, "maximum": 1}), "no output fits it: minimum (2) is gre"),
        (Guide.json_schema({"$ref": "#/no"}), "a $ref points to /no, which does not exist"),
        (Guide.json_schema({"$ref": "http://x/y"}), "http://x/y is outside the schema; references must stay within"),
        (Guide.json_schema({"not": {}}), 'not supported in a schema: "not"'),
        (Guide.grammar('x: "a"'), 'it has no rule "start"'),
        (Guide.grammar("start: x\nx: y"), "line 2, column 4: there is no rule y"),
        (Guide.grammar('start: "a'), "line 1, column 10: the syntax is wrong here"),
        (Guide.grammar("start: <nope>"), "line 1, column 8: there is no token <nope>"),
        (Guide.grammar("start: <[99999999]>"), "line 1, column 8: token 99999999 is not in the vocabulary"),
        (Guide.grammar('start: %json {"type": "nope"}'), "there is no type nope"),  # what "auto" makes of a form
        (Guide.grammar("start: @other"), "there is no grammar @other"),
    ],
)
def test_what_is_wrong_with_a_guide_is_told_in_our_words(
    model: Transformer, make_engine: Callable, tokenizer: Tokenizer, guide: Guide, told: str
) -> None:
    with pytest.raises(EngineError) as caught:
        make_engine(model, tokenizer, eos_token_ids=[0]).matcher(SamplingParams(guided=guide))
    assert str(caught.value).startswith(f"guided {guide.kind}: {told}")


@pytest.mark.parametrize(
    "said",
    [
        "panic: removal index (is 0) should be < len (is 0)\n<backtrace>\n   0: <unknown>",
        "lexer error: too many expressions constructed\n<non-verbose/>",
        "Parser Error: Current row has 5001 items; max is 2000; consider making your grammar left-recursive",
        "initial lexer configuration (grammar) too big (limit for this grammar: 1000000)",
        "unknown field `foo`, expected one of `item_separator`, `key_separator`\n<state>\nTokens: ⟦⟧\n</state>",
        "",
    ],
)
def test_what_the_library_says_of_itself_is_not_told(said: str) -> None:
    for kind in ("json_schema", "regex", "grammar"):
        told = guidance._reason(kind, said)
        assert told == "it cannot be compiled: it is wrong, or takes too much; make it simpler"


def test_a_guide_is_compiled_once_and_never_by_the_engine(
    model: Transformer, make_engine: Callable, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, tokenizer, eos_token_ids=[0])
    compiled: list[str] = []
    compile_guide = guide_worker.compile_guide

    def slow(vocabulary: object, kind: str, source: str) -> object:
        compiled.append(threading.current_thread().name)
        gate.wait()
        return compile_guide(vocabulary, kind, source)  # type: ignore[arg-type]

    gate = threading.Event()
    monkeypatch.setattr(guide_worker, "compile_guide", slow)
    params = SamplingParams(max_tokens=9, guided=Guide.regex("[ab]{3}"))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(engine.matcher, params) for _ in range(4)]
        while not compiled:
            time.sleep(0.01)
        assert len(text_of(engine, SamplingParams(max_tokens=5))[0]) > 0, "others decode meanwhile"
        gate.set()
        matchers = [each.result() for each in waiting]
    assert len(compiled) == 1 and len({id(matcher) for matcher in matchers}) == 1
    engine.add(Request("guided", [10], params, matcher=matchers[0]))
    while engine.has_work():
        engine.step()
    assert len(compiled) == 1


def test_compiled_guides_are_kept_up_to_a_size(
    make_engine: Callable, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, tokenizer, eos_token_ids=[0])
    for number in range(40):
        engine.matcher(SamplingParams(guided=Guide.regex(f"a{number}")))
    grammars = engine._grammars
    assert len(grammars._compiled) == guidance.KEPT_GRAMMARS and not grammars._compiling
    monkeypatch.setattr(guidance, "KEPT_CHARACTERS", 1000)
    for number in range(6):
        engine.matcher(SamplingParams(guided=Guide.regex("b" * 300 + str(number))))
    assert sum(len(guide.source) for guide in grammars._compiled) <= guidance.KEPT_CHARACTERS


def test_what_goes_wrong_in_a_step_says_nothing_of_the_library(
    make_engine: Callable, model: Transformer, tokenizer: Tokenizer
) -> None:
    engine = make_engine(model, tokenizer, eos_token_ids=[0])
    matcher = engine.matcher(SamplingParams(guided=Guide.regex("[ab]{3}"))).copy()
    outside = next(token for token in range(5, 200) if tokenizer.token_bytes(token) not in (b"a", b"b"))
    with pytest.raises(guidance.GuideFailed) as caught:
        matcher.advance(outside)
    assert str(caught.value) == "the output's form takes too much work to follow; make it simpler"
