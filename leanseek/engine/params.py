"""What a request asks for: vLLM's names and defaults, checked once, when made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from leanseek.engine.spans import Spans
from leanseek.errors import InputError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 64


class EngineError(InputError):
    """A request or an option the engine cannot serve; one line that says how to mend it."""


@dataclass(frozen=True)
class Guide:
    """A form the output must have. Made by the constructors below; compiled before the request is added."""

    kind: Literal["json_schema", "regex", "grammar"]
    source: str

    @staticmethod
    def json_schema(schema: Mapping[str, Any] | str) -> Guide:
        """Output is JSON that the schema accepts."""
        return Guide("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @staticmethod
    def json_object() -> Guide:
        """Output is any JSON object."""
        return Guide.json_schema({"type": "object"})

    @staticmethod
    def regex(pattern: str) -> Guide:
        """Output matches the whole pattern (Rust's syntax, no look-around)."""
        return Guide("regex", pattern)

    @staticmethod
    def grammar(lark: str) -> Guide:
        """Output is in the language of a Lark grammar (llguidance's dialect) with a rule `start`."""
        return Guide("grammar", lark)

    @staticmethod
    def choice(texts: Sequence[str]) -> Guide:
        """Output is one of the texts."""
        return Guide("grammar", "start: " + " | ".join(json.dumps(text) for text in texts))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and when they end.

    Logprobs are of the model's own distribution, before temperature, penalties and masks.

    Raises:
        EngineError: a value out of its range.
    """

    n: int = 1  # choices for one prompt
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens in the prompt or the output
    presence_penalty: float = 0.0  # of tokens in the output, once each
    frequency_penalty: float = 0.0  # of tokens in the output, times their count
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16  # None: to the end of the context
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None  # of each sampled token, with that many alternatives
    prompt_logprobs: int | None = None
    guided: Guide | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    spans: Spans | None = None  # where stop strings do not count

    def __post_init__(self) -> None:
        self._normalise()
        self._check_ranges()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise EngineError(f"min_tokens = {self.min_tokens} exceeds max_tokens = {self.max_tokens}")
        if len(self.stop_strings) > MAX_STOPS or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise EngineError(f"stop must be at most {MAX_STOPS} strings, none of them empty")
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(token, int) or not _is_number(bias) or not -100 <= bias <= 100:
                raise EngineError("logit_bias must map token ids to numbers between -100 and 100")

    def _normalise(self) -> None:
        """Empty lists become None, lists tuples: the object is frozen and compares by value."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop) if stop else None)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids) if self.stop_token_ids else None)
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)

    def _check_ranges(self) -> None:
        whole = (
            ("n", 1, MAX_CHOICES),
            ("top_k", 0, None),
            ("max_tokens", 1, None),
            ("min_tokens", 0, None),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("seed", None, None),
        )
        real = (
            ("temperature", 0.0, None),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, None),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        )
        optional = {f.name for f in fields(self) if f.default is None} | {"max_tokens"}
        for name, low, high in (*whole, *real):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            kind = "a whole number" if (name, low, high) in whole else "a number"
            fits = _is_number(value) and (kind == "a number" or isinstance(value, int))
            if not fits or (low is not None and value < low) or (high is not None and value > high):
                bounds = (
                    f" between {low} and {high}"
                    if high is not None
                    else f" of at least {low}"
                    if low is not None
                    else ""
                )
                raise EngineError(f"{name} must be {kind}{bounds}, not {value!r}")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise EngineError(f"{name} must be greater than 0")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @cached_property
    def greedy(self) -> bool:
        return self.temperature == 0

    @cached_property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen (a guide's masks apart)."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.logit_bias or self.min_tokens)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
