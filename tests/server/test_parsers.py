"""Reasoning and tool calls are told apart from the answer, however the text is cut into pieces."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanseek.server.parsers import (
    DEEPSEEK_V3_TOOLS,
    DEEPSEEK_V31_TOOLS,
    KIMI_K2_TOOLS,
    ForcedCallParser,
    OutputParser,
    ReasoningSplitter,
    ToolCallParser,
    ToolFormat,
)

FORMATS = {"v3": DEEPSEEK_V3_TOOLS, "v3.1": DEEPSEEK_V31_TOOLS, "kimi": KIMI_K2_TOOLS}
V3_CALLS = (
    "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Hangzhou"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n'
    "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V31_CALLS = (
    "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Hangzhou"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>"
)
KIMI_CALLS = (
    "Let me look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Hangzhou"}<|tool_call_end|><|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|><|tool_calls_section_end|>"
)
CALLS = {"v3": V3_CALLS, "v3.1": V31_CALLS, "kimi": KIMI_CALLS}

Result = tuple[str, str, list[tuple[str, str | None, str]]]


def parse(pieces: list[str], opened: bool | None, form: ToolFormat | None) -> Result:
    """(reasoning, content, calls) of a text given in pieces; `opened` None is a model that does not reason."""
    splitter = None if opened is None else ReasoningSplitter(opened)
    parser = OutputParser(splitter, ToolCallParser(form) if form else None)
    reasoning, content, calls = "", "", []
    for number, piece in enumerate(pieces):
        parsed = parser.feed(piece, final=number == len(pieces) - 1)
        reasoning, content = reasoning + parsed.reasoning, content + parsed.content
        for call in parsed.tool_calls:
            if call.name is not None:
                assert call.index == len(calls), "calls are numbered in order, and named first"
                calls.append((call.name, call.id, ""))
            calls[-1] = (*calls[-1][:2], calls[-1][2] + call.arguments)
    return reasoning, content, calls


@pytest.mark.parametrize(
    ("opened", "text", "reasoning", "content"),
    [
        (True, "I see.\n</think>\n\nFour.", "I see.", "Four."),
        (True, "\nI see.</think>Four.", "I see.", "Four."),
        (True, "<think>\nI see.\n</think>\nFour.", "I see.", "Four."),  # the model repeats the mark
        (True, "Cut off\n", "Cut off", ""),
        (True, "", "", ""),
        (False, "Four.", "", "Four."),
        (False, " <think>I see.</think>Four.", "I see.", "Four."),  # the model begins to think by itself
        (False, "  Four < five", "", "  Four < five"),
        (False, "<thin", "", "<thin"),
        (False, "Say <think> aloud", "", "Say <think> aloud"),  # only at the beginning is it a mark
        (None, "<think>I see.</think>", "", "<think>I see.</think>"),
    ],
)
def test_reasoning_is_split_from_the_answer(opened: bool | None, text: str, reasoning: str, content: str) -> None:
    assert parse([text], opened, None) == (reasoning, content, [])


@pytest.mark.parametrize("name", FORMATS)
def test_published_tool_calls_are_parsed(name: str) -> None:
    ids = ["functions.get_weather:0", "functions.get_time:1"] if name == "kimi" else [None, None]
    expected = [("get_weather", ids[0], '{"city": "Hangzhou"}'), ("get_time", ids[1], "{}")]
    assert parse([CALLS[name]], None, FORMATS[name]) == ("", "Let me look.", expected)


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_shown_to_the_model_is_in_its_format(name: str) -> None:
    _, content, calls = parse([FORMATS[name].example("f", '{"a": 1}')], None, FORMATS[name])
    assert (content, [(call[0], call[2]) for call in calls]) == ("", [("f", '{"a": 1}')])


def section(form: ToolFormat, *bodies: str) -> str:
    """A section of calls with these bodies."""
    calls = "".join(f"{form.call_begin}{body}{form.call_end}" for body in bodies)
    return f"{form.section_begin}{calls}{form.section_end}"


def body(form: ToolFormat, name: str, arguments: str) -> str:
    return form.header.format(name=name) + form.arguments_begin + arguments + form.arguments_end


@pytest.mark.parametrize("name", ["v3", "v3.1"])
@pytest.mark.parametrize(
    "written",
    [
        'function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```',
        'function<｜tool▁sep｜>f\n```\n{"a": 1}\n```',
        'function<｜tool▁sep｜>f\n```JSON {"a": 1} ```',
        'function<｜tool▁sep｜>f\n~~~json\n{"a": 1}\n~~~',
        'function<｜tool▁sep｜>f\n````python\n{"a": 1}\n````\n',
        'function<｜tool▁sep｜>f\n```json\n{"a": 1}',
        'function<｜tool▁sep｜>f\n{"a": 1}',
        '<｜tool▁sep｜>f\n{"a": 1}',
        'f<｜tool▁sep｜>{"a": 1}',
        'f<｜tool▁sep｜>\n```json\n{"a": 1}\n```',
        'f\n{"a": 1}',
        'f{"a": 1}',
    ],
)
def test_deepseeks_calls_with_any_fence_or_none(name: str, written: str) -> None:
    form = FORMATS[name]
    assert parse([section(form, written)], None, form) == ("", "", [("f", None, '{"a": 1}')])


@pytest.mark.parametrize(
    ("written", "call_id"),
    [
        ('functions.f:3<|tool_call_argument_begin|>{"a": 1}', "functions.f:3"),
        ('functions.f:3<|tool_call_argument_begin|>\n```json\n{"a": 1}\n```', "functions.f:3"),
        ('functions.f:3\n{"a": 1}', "functions.f:3"),
        ('functions.f<|tool_call_argument_begin|>{"a": 1}', None),
        ('f<|tool_call_argument_begin|> {"a": 1} ', None),
    ],
)
def test_kimis_calls_with_and_without_index_and_fence(written: str, call_id: str | None) -> None:
    assert parse([section(KIMI_K2_TOOLS, written)], None, KIMI_K2_TOOLS) == ("", "", [("f", call_id, '{"a": 1}')])


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("v3", "function<｜tool▁sep｜>f"),
        ("v3", "function<｜tool▁sep｜>f\n```json\n```"),
        ("v3", "function<｜tool▁sep｜>f\n```json\n{}\n```"),
        ("v3.1", "f<｜tool▁sep｜>"),
        ("v3.1", "f<｜tool▁sep｜>\n"),
        ("v3.1", "f"),
        ("kimi", "functions.f:0"),
        ("kimi", "functions.f:0<|tool_call_argument_begin|>"),
    ],
)
def test_a_call_without_arguments_has_none(name: str, written: str) -> None:
    ((called, _, arguments),) = parse([section(FORMATS[name], written)], None, FORMATS[name])[2]
    assert (called, arguments) == ("f", "{}")


@pytest.mark.parametrize("name", FORMATS)
def test_what_stands_around_calls_is_content(name: str) -> None:
    form = FORMATS[name]
    one, two = (f"{form.call_begin}{body(form, each, '{}')}{form.call_end}" for each in "fg")
    text = f"First.\n{form.section_begin}\n{one} and \n{two}\nso\n{form.section_end}\nLast."
    _, content, calls = parse([text], None, form)
    assert content == "First.\n and \n\nso\n\nLast."
    assert [call[0] for call in calls] == ["f", "g"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "arguments", ["{", '{"a": }', "[1]", "5", '{"a": NaN}', "{} {}", "so: {}", '{"a": "x\ny"}', "[" * 5000]
)
def test_arguments_that_are_no_json_object_are_content(name: str, arguments: str) -> None:
    """As is the mark of a call without a name; the well-formed call behind them is a call."""
    form = FORMATS[name]
    wrong = section(form, body(form, "f", arguments), form.arguments_begin + "{}")
    right = section(form, body(form, "g", '{"b": 10000000000000000000000}'))
    _, content, calls = parse([wrong + right + "bye"], None, form)
    assert content == wrong + "bye"
    assert [(call[0], call[2]) for call in calls] == [("g", '{"b": 10000000000000000000000}')]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("prose", ["The mark {} begins calls.", "{}", "{}{} and {}", "{} " + "x" * 1000])
def test_marks_in_prose_are_content(name: str, prose: str) -> None:
    form = FORMATS[name]
    for mark in (form.section_begin, form.section_end, form.call_begin, form.call_end):
        text = prose.replace("{}", mark)
        assert parse([text, ""], None, form) == ("", text, [])
    pair = prose.replace("{}", form.section_begin + form.call_begin)
    assert parse([pair, ""], None, form) == ("", pair, [])


def test_prose_behind_a_mark_is_not_held_back_to_the_end() -> None:
    form = DEEPSEEK_V31_TOOLS
    parser = OutputParser(None, ToolCallParser(form))
    text = f"Write {form.section_begin}{form.call_begin} and go on: " + "x" * 300
    assert parser.feed(text).content == text


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_cut_inside_a_call_is_content(name: str) -> None:
    """Wherever it is cut; a call whose arguments are whole is one."""
    text, whole = CALLS[name], CALLS[name].index("}") + 1
    for place in range(len("Let me look."), len(text)):
        _, content, calls = parse([text[:place]], None, FORMATS[name])
        assert calls or content == text[:place]
        assert not calls or place >= whole
        assert calls or place != whole
        assert all(isinstance(json.loads(call[2]), dict) for call in calls)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("before", "behind", "reasoning", "content"),
    [
        ("I ask.", "", "I ask.", ""),
        ("I ask.\n\n", "</think>", "I ask.", ""),
        ("<think>I ask.\n", "\n</think>\n\nDone.", "I ask.", "Done."),
        ("I ask.", "Done.", "I ask.", "Done."),
        ("I ask.", "More.</think>Done.", "I ask.", "More.Done."),
        ("I know </think> ends it.", "", "I know ", " ends it."),
        ("", "", "", ""),
    ],
)
def test_a_call_ends_the_reasoning(name: str, before: str, behind: str, reasoning: str, content: str) -> None:
    form = FORMATS[name]
    written = section(form, body(form, "f", '{"a": "</think>"}'))
    found = parse([before + written + behind], True, form)
    assert found[:2] == (reasoning, content)
    assert [(call[0], call[2]) for call in found[2]] == [("f", '{"a": "</think>"}')]


@pytest.mark.parametrize("name", FORMATS)
def test_a_mark_that_reasoning_mentions_does_not_end_it(name: str) -> None:
    form = FORMATS[name]
    thought = f"I could write {form.section_begin} or {form.call_begin}f{form.call_end} now."
    assert parse([f"{thought}</think>No."], True, form) == (thought, "No.", [])


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_cut_off_in_the_reasoning_is_content(name: str) -> None:
    form = FORMATS[name]
    cut = form.section_begin + form.call_begin + body(form, "f", '{"a": "Hang')
    assert parse([f"I ask.\n{cut}"], True, form) == ("I ask.", cut, [])


def test_calls_beyond_the_most_are_content() -> None:
    form = DEEPSEEK_V31_TOOLS
    parser = ToolCallParser(form, most=1)
    parsed = parser.feed(section(form, "f", "g"), final=True)
    assert [call.name for call in parsed.tool_calls] == ["f", None]
    assert parsed.content == f"{form.call_begin}g{form.call_end}"


MARKS = [
    "<think>", "</think>", "\n", "\n```json\n", "\n```", "function", "name", '{"a": 1}', "text", " ", "<", "`", "<｜tool",
    "{}", '{"a": ', '"</think>"}', "functions.", ":1", "[",
    *(getattr(form, mark) for form in FORMATS.values() for mark in ("section_begin", "section_end", "call_begin")),
    *(getattr(form, mark) for form in FORMATS.values() for mark in ("arguments_begin", "call_end")),
    "<｜tool▁sep｜>",
]  # fmt: skip
SECTIONS = [
    section(form, *bodies)
    for form in FORMATS.values()
    for bodies in ([body(form, "f", '{"a": 1}')], [body(form, "f", "{}"), body(form, "g", "[")], ["f", "x y"])
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(MARKS), max_size=14).map("".join),
    st.lists(st.sampled_from([*SECTIONS, *MARKS]), max_size=8).map("".join),
    st.sampled_from([f"hm\n</think>\n\n{calls}" for calls in CALLS.values()]),
)


@given(
    TEXTS,
    st.lists(st.integers(1, 12), max_size=30),
    st.sampled_from([None, False, True]),
    st.sampled_from(list(FORMATS)),
)
@settings(max_examples=400, deadline=None)
def test_how_the_text_is_cut_does_not_matter(text: str, sizes: list[int], opened: bool | None, name: str) -> None:
    pieces, rest = [], text
    for size in sizes:
        pieces, rest = [*pieces, rest[:size]], rest[size:]
    assert parse([*pieces, rest], opened, FORMATS[name]) == parse([text], opened, FORMATS[name])


def accounts_for(text: str, parts: list[str], dropped: re.Pattern[str]) -> bool:
    """Whether the text is the parts in their order with nothing between them but what may be dropped."""

    def behind(places: set[int]) -> set[int]:
        todo, reached = list(places), set(places)
        while todo:
            match = dropped.match(text, todo.pop())
            if match and match.end() not in reached:
                todo.append(match.end())
                reached.add(match.end())
        return reached

    places = behind({0})
    for part in parts:
        found = {place + len(part) for place in places if text.startswith(part, place)}
        places = behind(found | places if part == "{}" else found)  # no arguments are told as {}
    return len(text) in places


@given(TEXTS, st.sampled_from([None, False, True]), st.sampled_from(list(FORMATS)))
@settings(max_examples=300, deadline=None)
def test_every_character_is_accounted_for(text: str, opened: bool | None, name: str) -> None:
    """Of the marks of calls not one more goes than there are calls."""
    form = FORMATS[name]
    parser = OutputParser(None if opened is None else ReasoningSplitter(opened), ToolCallParser(form))
    parts: list[str] = []  # in the order of the text, for each character is fed alone
    calls = 0
    for number, character in enumerate([*text, ""]):
        parsed = parser.feed(character, final=number == len(text))
        parts.append(parsed.reasoning + parsed.content)
        for call in parsed.tool_calls:
            calls += call.name is not None
            assert call.name or isinstance(json.loads(call.arguments), dict)
            parts += [call.name or "", call.arguments]
    marks = [form.section_begin, form.section_end, form.call_begin, form.call_end, form.arguments_begin.strip()]
    marks += ["<think>", "</think>", "<｜tool▁sep｜>", "functions.", "function"]
    dropped = re.compile("|".join(map(re.escape, marks)) + r"|:\d|`+(json)?|\s")
    assert accounts_for(text, [part for part in parts if part], dropped)
    told = "".join(parts)
    assert text.count(form.call_begin) == told.count(form.call_begin) + calls
    assert text.count(form.section_begin) <= told.count(form.section_begin) + calls


def test_nothing_is_held_back_longer_than_needed() -> None:
    """Streaming would be pointless otherwise: plain text leaves at once, up to what may begin a mark."""
    parser = OutputParser(ReasoningSplitter(opened=True), ToolCallParser(DEEPSEEK_V3_TOOLS))
    assert parser.feed("thinking hard </thi").reasoning == "thinking hard "
    assert parser.feed("nk>The answer").content == "The answer"
    assert parser.feed(" is <｜tool").content == " is "
    assert parser.feed("box").content == "<｜toolbox"


def test_a_forced_call_to_one_function_streams_its_arguments() -> None:
    parser = ForcedCallParser(["f"])
    pieces = [parser.feed('{"a"'), parser.feed(": 1}"), parser.feed("", final=True)]
    calls = [call for piece in pieces for call in piece.tool_calls]
    assert [call.name for call in calls] == ["f", None]
    assert "".join(call.arguments for call in calls) == '{"a": 1}'


def test_a_forced_call_to_one_of_several_is_told_when_complete() -> None:
    parser = ForcedCallParser(["f", "g"])
    assert not parser.feed('{"name": "g", "argu')
    (call,) = parser.feed('ments": {"b": "é"}}', final=True).tool_calls
    assert (call.name, json.loads(call.arguments)) == ("g", {"b": "é"})
    broken = ForcedCallParser(["f", "g"]).feed('{"name": "g", ', final=True)
    assert broken.content == '{"name": "g", ' and not broken.tool_calls
