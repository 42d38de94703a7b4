"""Tracks which part of a text is being written: stop strings count in the answer, not in reasoning or tool calls.

The engine knows no chat format; the caller provides the marks (`Spans`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["begin", "reasoning", "answer", "calls"]


@dataclass(frozen=True)
class Spans:
    """The marks around reasoning and tool calls.

    think: begins reasoning if the text starts with it; None for an answer without reasoning
    opened: the prompt ends inside the reasoning
    section: start and end of a section of calls
    call: start and end of one call. A call may come without a section, but then does not end reasoning. A section's
        start without a call after it is only a mention.
    """

    think: str | None = None
    end_think: str = "</think>"
    opened: bool = False
    section: tuple[str, str] | None = None
    call: tuple[str, str] = ("", "")


class SpanTracker:
    """Follows a growing text."""

    __slots__ = ("_marks", "_spans", "_tail", "_unsure", "part")

    def __init__(self, spans: Spans):
        self._spans = spans
        self._tail = ""  # end of the text seen, which may hold part of a mark; in "begin", all undecided text
        self._unsure = False  # a section has begun, and it is open whether a call follows
        self.part: Part = "reasoning" if spans.opened else "begin" if spans.think else "answer"
        reasoning = re.escape(spans.end_think)
        self._marks: dict[Part, re.Pattern[str]] = {}
        if spans.section:
            begin, call = re.escape(spans.section[0]), re.escape(spans.call[0])
            reasoning += rf"|{begin}\s*{call}"
            self._marks["answer"] = re.compile(f"{begin}|{call}")
        self._marks["reasoning"] = re.compile(reasoning)

    def feed(self, text: str) -> list[tuple[Part, str]]:
        """Add text; return the parts known by now, in order."""
        known: list[tuple[Part, str]] = []
        while text:
            if self.part == "begin":
                text = self._begin(text)
                continue
            if self._unsure:
                known.append(("calls", self._section(text)))
                text = text[len(known[-1][1]) :]
                continue
            mark = self._marks[self.part].search(self._tail + text) if self.part in self._marks else None
            if not mark:
                known.append((self.part, text))
                self._tail = (self._tail + text)[-128:]
                break
            used = len(self._tail)
            start, end = max(0, mark.start() - used), mark.end() - used
            before = self.part
            self._pass(mark[0])
            if before == "answer":  # the mark belongs to the calls
                known += [(before, text[:start]), (self.part, text[start:end])]
            else:
                known.append((before, text[:end]))
            self._tail, text = "", text[end:]
        return known

    def rest(self) -> str:
        """The text that is still undecided at its end."""
        return self._tail if self.part == "begin" else ""

    def _begin(self, text: str) -> str:
        """Decide how the text begins; return the decided text, or "" while it is undecided."""
        self._tail += text
        think, written = self._spans.think or "", self._tail.lstrip()
        if think.startswith(written) and written != think:
            return ""
        self.part = "reasoning" if written.startswith(think) else "answer"
        text, self._tail = self._tail, ""
        return text

    def _section(self, text: str) -> str:
        """Look for the call after a section's start; return the text that belongs to the section until it is found."""
        begin, written = self._spans.call[0], (self._tail + text).lstrip()
        if begin.startswith(written) and written != begin:
            self._tail += text
            return text
        self._unsure = False
        if not written.startswith(begin):
            self.part = "answer"
        return ""

    def _pass(self, mark: str) -> None:
        """Switch to the part after a mark."""
        spans = self._spans
        if not spans.section or self.part == "calls" or mark == spans.end_think:
            self.part = "answer"
            return
        alone = mark == spans.call[0]
        ends = [spans.section[1], *spans.call[1:] * alone]
        self._marks["calls"] = re.compile("|".join(map(re.escape, ends)))
        self._unsure = self.part == "answer" and not alone
        self.part = "calls"
