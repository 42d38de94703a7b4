"""Splits model output, as it streams, into reasoning, answer and tool calls.

The joined result does not depend on how the text is cut into pieces. Text that may be the start of a mark (`</think>`,
`<｜tool▁calls▁begin｜>`, ...) is held back until that is decided, and a tool call until it is complete. Nothing is
lost: text that is neither reasoning nor a well-formed call is content, marks included. Only the marks of parsed parts
are removed, with the line breaks around `</think>`, the whitespace between the marks of calls, and the whitespace and
fence around arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from leanseek.engine import Spans

THINK, END_THINK = "<think>", "</think>"
_MAX_HEADER = 256  # characters before a call's arguments; longer text is not a call


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A piece of tool call `index`. The first piece has the name, and the id if the format includes one."""

    index: int
    arguments: str
    name: str | None = None
    id: str | None = None


@dataclass(slots=True)
class Parsed:
    """What a piece of text added."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)

    def pieces(self) -> list[Parsed]:
        """Split into pieces that hold one thing each: reasoning, content, or a piece of a call."""
        calls = [Parsed(tool_calls=[call]) for call in self.tool_calls]
        return [piece for piece in (Parsed(reasoning=self.reasoning), Parsed(content=self.content), *calls) if piece]


class Parser(Protocol):
    def feed(self, text: str, final: bool = False) -> Parsed:
        """Parse a piece of text; `final` also returns the text held back."""


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes tool calls, as published with the models."""

    section_begin: str
    section_end: str
    call_begin: str
    call_end: str
    header: str  # for `example`; contains {name}
    arguments_begin: str
    arguments_end: str
    body: re.Pattern[str]  # the inside of a call: `name`, `arguments`, and `id` if the format has one

    def example(self, name: str, arguments: str) -> str:
        """A section with one call, as the model should write it."""
        call = f"{self.header.format(name=name)}{self.arguments_begin}{arguments}{self.arguments_end}"
        return f"{self.section_begin}{self.call_begin}{call}{self.call_end}{self.section_end}"

    @cached_property
    def opening(self) -> re.Pattern[str]:
        """The start of a call, with the start of its section if it is the first."""
        return re.compile(rf"(?:{re.escape(self.section_begin)}\s*)?{re.escape(self.call_begin)}")

    @cached_property
    def opening_of_section(self) -> re.Pattern[str]:
        """The start of a section and of its first call; a mark that the text only mentions does not match."""
        return re.compile(rf"{re.escape(self.section_begin)}\s*{re.escape(self.call_begin)}")


# Models mix the two published forms, so both parse: function<sep>NAME with a block of JSON, and NAME<sep>JSON.
_DEEPSEEK_BODY = re.compile(
    r"\s{0,8}(?:(?:function)?\s{0,8}<｜tool▁sep｜>\s{0,8})?(?P<name>[\w.-]+)\s{0,8}(?:<｜tool▁sep｜>)?(?P<arguments>.*)",
    re.DOTALL,
)
DEEPSEEK_V3_TOOLS = ToolFormat(
    section_begin="<｜tool▁calls▁begin｜>",
    section_end="<｜tool▁calls▁end｜>",
    call_begin="<｜tool▁call▁begin｜>",
    call_end="<｜tool▁call▁end｜>",
    header="function<｜tool▁sep｜>{name}",
    arguments_begin="\n```json\n",
    arguments_end="\n```",
    body=_DEEPSEEK_BODY,
)
DEEPSEEK_V31_TOOLS = ToolFormat(
    section_begin="<｜tool▁calls▁begin｜>",
    section_end="<｜tool▁calls▁end｜>",
    call_begin="<｜tool▁call▁begin｜>",
    call_end="<｜tool▁call▁end｜>",
    header="{name}",
    arguments_begin="<｜tool▁sep｜>",
    arguments_end="",
    body=_DEEPSEEK_BODY,
)
KIMI_K2_TOOLS = ToolFormat(
    section_begin="<|tool_calls_section_begin|>",
    section_end="<|tool_calls_section_end|>",
    call_begin="<|tool_call_begin|>",
    call_end="<|tool_call_end|>",
    header="functions.{name}:0",
    arguments_begin="<|tool_call_argument_begin|>",
    arguments_end="",
    body=re.compile(
        r"\s{0,8}(?P<id>(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?)\s{0,8}"
        r"(?:<\|tool_call_argument_begin\|>)?(?P<arguments>(?:[\s{`~].*)?)",
        re.DOTALL,
    ),
)


class OutputParser:
    """Splits reasoning from the answer, and extracts tool calls from the answer. A call ends the reasoning."""

    def __init__(self, reasoning: ReasoningSplitter | None, tools: ToolCallParser | None):
        self._reasoning = reasoning
        self._tools = tools
        if reasoning and tools:
            reasoning.until_call = tools.form

    @property
    def spans(self) -> Spans | None:
        """Where stop strings are ignored; None if nowhere."""
        if not self._reasoning and not self._tools:
            return None
        form = self._tools.form if self._tools else None
        return Spans(
            think=THINK if self._reasoning else None,
            end_think=END_THINK,
            opened=self._reasoning is not None and self._reasoning.opened,
            section=(form.section_begin, form.section_end) if form else None,
            call=(form.call_begin, form.call_end) if form else ("", ""),
        )

    def feed(self, text: str, final: bool = False) -> Parsed:
        parsed = self._reasoning.feed(text, final) if self._reasoning else Parsed(content=text)
        if self._tools:
            if self._reasoning and self._reasoning.ended_by_call:
                self._tools.await_end_think()
                self._reasoning.ended_by_call = False
            answer = self._tools.feed(parsed.content, final)
            parsed.content, parsed.tool_calls = answer.content, answer.tool_calls
        return parsed


class ReasoningSplitter:
    """Splits `<think>reasoning</think>answer`; line breaks around the marks belong to neither part.

    `opened`: the prompt ended with `<think>`, so the text begins inside reasoning (R1, V3.1 thinking).
    """

    def __init__(self, opened: bool):
        self.opened = opened
        self._step = self._begin
        self._buffer = ""
        self.until_call: ToolFormat | None = None  # a call in this format ends the reasoning and begins the answer
        self.ended_by_call = False

    def feed(self, text: str, final: bool = False) -> Parsed:
        self._buffer += text
        parsed = Parsed()
        step = None
        while step != self._step:  # until the state stops changing
            step = self._step
            step(parsed, final)
        return parsed

    def _begin(self, parsed: Parsed, final: bool) -> None:
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._buffer = text[len(THINK) :]
            self._step = self._inside_begin
        elif final or not THINK.startswith(text):
            self._step = self._inside_begin if self.opened else self._answer

    def _inside_begin(self, parsed: Parsed, final: bool) -> None:
        self._buffer = self._buffer.lstrip("\n")
        if self._buffer or final:
            self._step = self._inside

    def _inside(self, parsed: Parsed, final: bool) -> None:
        before, mark, after = self._buffer.partition(END_THINK)
        call = self.until_call.opening_of_section.search(before) if self.until_call else None
        if call:
            before, after = before[: call.start()], self._buffer[call.start() :]
            self.ended_by_call = True
        if mark or call or final:
            parsed.reasoning += before.rstrip("\n")
            self._buffer = after
            self._step = self._answer_begin if mark and not call else self._answer
            return
        keep = len(self._buffer) - max(_possible(self._buffer, END_THINK), self._possible_call())
        keep = len(self._buffer[:keep].rstrip("\n"))
        parsed.reasoning += self._buffer[:keep]
        self._buffer = self._buffer[keep:]

    def _possible_call(self) -> int:
        """Length of the tail that may be the start of a section with a call in it."""
        if not self.until_call:
            return 0
        begin, call_begin = self.until_call.section_begin, self.until_call.call_begin
        place = self._buffer.rfind(begin)
        if place >= 0 and call_begin.startswith(self._buffer[place + len(begin) :].lstrip()):
            return len(self._buffer) - place
        return _possible(self._buffer, begin)

    def _answer_begin(self, parsed: Parsed, final: bool) -> None:
        self._buffer = self._buffer.lstrip("\n")
        if self._buffer or final:
            self._step = self._answer

    def _answer(self, parsed: Parsed, final: bool) -> None:
        parsed.content += self._buffer
        self._buffer = ""


class ToolCallParser:
    """Extracts tool calls from a text. A call has a name and a JSON object as arguments (no arguments become "{}").

    A call is returned once it is complete. Text around calls, and text that only looks like a call, is content.
    most: how many calls to return; further ones are content
    """

    def __init__(self, form: ToolFormat, most: int | None = None):
        self.form = form
        self._most = most
        self._buffer = ""
        self._searched = 0  # characters of the buffer already searched for the end of a call
        self._calls = 0
        self._in_section = False  # a call was returned, and its section has not ended
        self._after_call = False  # only whitespace since a call, and another mark may come
        self._end_think = False  # reasoning ended without its mark, which may still follow
        self._skip_lines = False  # after that mark

    def await_end_think(self) -> None:
        """A call has ended the reasoning, so a `</think>` in later text is a mark."""
        self._end_think = True

    def feed(self, text: str, final: bool = False) -> Parsed:
        self._buffer += text
        parsed = Parsed()
        while self._next(parsed, final):
            pass
        return parsed

    def _next(self, parsed: Parsed, final: bool) -> bool:
        """Consume text up to the next mark, or the mark itself; whether there may be more to consume."""
        form = self.form
        if self._skip_lines:
            self._buffer = self._buffer.lstrip("\n")
            self._skip_lines = not self._buffer
        marks = [form.section_begin, form.call_begin]
        marks += [form.section_end] * self._in_section + [END_THINK] * self._end_think
        place, mark = _first(self._buffer, marks)
        if not mark and not final:
            place -= max(_possible(self._buffer, each) for each in marks)
        between_marks = self._after_call and not self._buffer[:place].strip()
        if place and not (between_marks and (mark or not final)):
            self._emit(parsed, "" if between_marks else self._buffer[:place], place)
            return bool(mark)
        if mark in (form.section_begin, form.call_begin):
            return self._call(parsed, place, mark, final)
        if mark:
            self._emit(parsed, "", place + len(mark))
            if mark == END_THINK:
                self._end_think, self._skip_lines = False, True
            else:
                self._in_section, self._after_call = False, self._end_think
        return bool(mark)

    def _emit(self, parsed: Parsed, content: str, used: int) -> None:
        parsed.content += content
        self._buffer = self._buffer[used:]
        self._searched = 0
        self._after_call = False

    def _call(self, parsed: Parsed, place: int, mark: str, final: bool) -> bool:
        """Consume the call that may begin at `place`, or its mark as text; False if that needs more text to decide."""
        opening = self.form.opening.match(self._buffer, place)
        if not opening:  # only a section's start can come without a call
            after = self._buffer[place + len(mark) :].lstrip()
            if not final and self.form.call_begin.startswith(after):
                return False
        if not opening or self._calls == self._most:
            self._emit(parsed, self._buffer[: place + len(mark)], place + len(mark))
            return True
        begin, form = opening.end(), self.form
        ends = [form.call_end, form.section_end, form.call_begin, form.section_begin]
        end, end_mark = _first(self._buffer, ends, max(begin, self._searched))
        longest = max(map(len, ends))
        prose = "{" not in self._buffer[begin : begin + _MAX_HEADER]
        if not end_mark and not final and not (prose and end - begin >= _MAX_HEADER + longest):
            self._searched = max(0, end - longest)
            return False
        body = self._buffer[begin:end]
        match = None if prose and len(body) > _MAX_HEADER else form.body.fullmatch(body)
        closed = end_mark in (form.call_end, form.section_end)  # otherwise the call may be cut off, even in its name
        arguments = _arguments(match["arguments"], none="{}" if closed else None) if match else None
        if not match or arguments is None:
            self._emit(parsed, self._buffer[: place + len(mark)], place + len(mark))
            return True
        call_id = match.groupdict().get("id") or ""
        parsed.tool_calls += [
            ToolDelta(self._calls, "", match["name"], call_id if ":" in call_id else None),
            ToolDelta(self._calls, arguments),
        ]
        self._calls += 1
        self._emit(parsed, "", end + (len(end_mark) if end_mark == form.call_end else 0))
        self._in_section = self._after_call = True
        return True


class ForcedCallParser:
    """Parses output that was guided to be one tool call.

    With one function, the text is its arguments, returned as they come. With several, it is {"name": ...,
    "arguments": ...}, returned when complete. If max_tokens cuts the text, the first form yields incomplete arguments,
    the second yields content.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._buffer = ""
        self._told = False

    def feed(self, text: str, final: bool = False) -> Parsed:
        if len(self._names) == 1:
            if not text:
                return Parsed()
            name, self._told = (None if self._told else self._names[0]), True
            return Parsed(tool_calls=[ToolDelta(0, text, name)])
        self._buffer += text
        if not final:
            return Parsed()
        try:
            call = json.loads(self._buffer)
            return Parsed(tool_calls=[ToolDelta(0, json.dumps(call["arguments"], ensure_ascii=False), call["name"])])
        except (ValueError, KeyError, TypeError, RecursionError):
            return Parsed(content=self._buffer)


def _arguments(text: str, none: str | None) -> str | None:
    """The JSON object in a text, without fence and whitespace; `none` if the text is empty; None for anything else."""
    inner = text.strip()
    unfenced = inner.lstrip("`~")
    if unfenced != inner:
        inner = re.sub(r"\A\w*", "", unfenced)
    inner = inner.rstrip(" \t\r\n`~").lstrip()
    if not inner:
        return none
    try:
        return inner if isinstance(_JSON.decode(inner), dict) else None
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Checks the syntax only: it converts no numbers.
_JSON = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant)


def _possible(text: str, mark: str) -> int:
    """Length of the longest tail of the text that is the start of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _first(text: str, marks: Sequence[str], start: int = 0) -> tuple[int, str]:
    """The position of the first of several marks, and that mark; the text's length and "" if there is none."""
    return min(((place, mark) for mark in marks if (place := text.find(mark, start)) >= 0), default=(len(text), ""))
