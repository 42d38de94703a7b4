"""Which part of a text is being written: stop strings count in the answer, not in reasoning or tool calls.

The engine knows no chat format: whoever asks gives the marks (`Spans`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["begin", "reasoning", "answer", "calls"]


@dataclass(frozen=True)
class Spans:
    """The marks around reasoning and tool calls.

    think: begins reasoning where it is the first that is written; None for an answer without reasoning
    opened: the prompt ends inside the reasoning
    calls: begin and end of a section of calls; with `call_begin` behind its begin it ends reasoning too
    """

    think: str | None = None
    end_think: str = "</think>"
    opened: bool = False
    calls: tuple[str, str] | None = None
    call_begin: str = ""


class SpanTracker:
    """Follows a text that grows."""

    __slots__ = ("_marks", "_spans", "_tail", "part")

    def __init__(self, spans: Spans):
        self._spans = spans
        self._tail = ""  # the end of the text seen, where a mark may have begun; of "begin" all that is undecided
        self.part: Part = "reasoning" if spans.opened else "begin" if spans.think else "answer"
        begin, end = map(re.escape, spans.calls or ("", ""))
        calls = {"reasoning": rf"{begin}\s{{0,8}}{re.escape(spans.call_begin)}", "answer": begin, "calls": end}
        self._marks = {part: re.compile(mark) for part, mark in calls.items() if spans.calls}
        reasoning = re.escape(spans.end_think) + (f"|{calls['reasoning']}" if spans.calls else "")
        self._marks["reasoning"] = re.compile(reasoning)

    def feed(self, text: str) -> list[tuple[Part, str]]:
        """Take text; what is known of it by now, in its order."""
        known: list[tuple[Part, str]] = []
        while text:
            if self.part == "begin":
                text = self._begin(text)
                continue
            mark = self._marks[self.part].search(self._tail + text) if self.part in self._marks else None
            if not mark:
                known.append((self.part, text))
                self._tail = (self._tail + text)[-128:]
                break
            used = len(self._tail)
            start, end = max(0, mark.start() - used), mark.end() - used
            before = self.part
            self.part = self._after(mark[0])
            if before == "answer":  # the mark belongs to the calls
                known += [(before, text[:start]), (self.part, text[start:end])]
            else:
                known.append((before, text[:end]))
            self._tail, text = "", text[end:]
        return known

    def rest(self) -> str:
        """The text that is still undecided when it ends."""
        return self._tail if self.part == "begin" else ""

    def _begin(self, text: str) -> str:
        """Decide how the text begins; what is decided of it, or "" while it may still be either."""
        self._tail += text
        think, written = self._spans.think or "", self._tail.lstrip()
        if think.startswith(written) and written != think:
            return ""
        self.part = "reasoning" if written.startswith(think) else "answer"
        text, self._tail = self._tail, ""
        return text

    def _after(self, mark: str) -> Part:
        if self.part == "calls" or mark == self._spans.end_think:
            return "answer"
        return "calls"
