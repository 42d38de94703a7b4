"""The parameters of a request: vLLM's names and defaults, checked once at creation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, TypeGuard

from leanseek.engine.spans import Spans
from leanseek.errors import InputError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 64
GREEDY_BELOW = 1e-5  # lower temperatures count as 0, as in vLLM

_WHOLE = {  # inclusive bounds
    "n": (1, MAX_CHOICES),
    "top_k": (0, None),
    "max_tokens": (1, None),
    "min_tokens": (0, None),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "seed": (None, None),
}
_REAL: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_LOGIT_BIAS = 100.0


class EngineError(InputError):
    """The engine cannot serve a request or an option; the message says in one line how to fix that."""


@dataclass(frozen=True)
class Guide:
    """The form that the output must have. Use the constructors below; compiled before the request is added."""

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
    """How the tokens of a request are sampled, and when the output ends.

    Logprobs come from the model's own distribution, before temperature, penalties and masks.

    Raises:
        EngineError: a value is out of its range.
    """

    n: int = 1  # choices per prompt
    temperature: float = 1.0  # 0 to 100; 0: greedy
    top_p: float = 1.0  # 0.000001 to 1
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0  # 0 to 1
    repetition_penalty: float = 1.0  # of tokens in the prompt or the output, 0.01 to 100
    presence_penalty: float = 0.0  # of tokens in the output, once each, -2 to 2
    frequency_penalty: float = 0.0  # of tokens in the output, times their count, -2 to 2
    logit_bias: Mapping[int, float] | None = None  # -100 to 100
    seed: int | None = None
    max_tokens: int | None = 16  # None: to the end of the context
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None  # for each sampled token, with this many alternatives
    prompt_logprobs: int | None = None
    sampled_logprobs: bool = False  # of each sampled token, after temperature; not with what else changes the sampling
    guided: Guide | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    spans: Spans | None = None  # where stop strings are ignored

    def __post_init__(self) -> None:
        self._normalise()
        self._check_ranges()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise EngineError(f"min_tokens = {self.min_tokens} exceeds max_tokens = {self.max_tokens}")
        if len(self.stop_strings) > MAX_STOPS or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise EngineError(f"stop must be at most {MAX_STOPS} strings, none of them empty")
        if self.sampled_logprobs and (self.top_p < 1 or self.top_k or self.min_p or self.adjusts or self.guided):
            raise EngineError(
                "sampled_logprobs are those of softmax(logits / temperature): leave top_p, top_k, min_p, penalties, "
                "logit_bias, min_tokens and guides away"
            )
        for token, bias in (self.logit_bias or {}).items():
            if not _is_whole(token) or not _is_between(bias, -_LOGIT_BIAS, _LOGIT_BIAS):
                raise EngineError("logit_bias must map token ids to numbers between -100 and 100")
        if not all(map(_is_whole, self.stop_token_ids or ())):
            raise EngineError("stop_token_ids must be token ids")

    def _normalise(self) -> None:
        """Turn empty lists into None and lists into tuples, because the object is frozen and compared by value."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop) if stop else None)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids) if self.stop_token_ids else None)
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)

    def _check_ranges(self) -> None:
        optional = {f.name for f in fields(self) if f.default is None} | {"max_tokens"}
        for name, (low, high) in (_WHOLE | _REAL).items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not (name in _REAL or _is_whole(value)) or not _is_between(value, low, high):
                kind = "a number" if name in _REAL else "a whole number"
                least = "" if low is None else f" of at least {low}"
                bounds = least if high is None else f" between {low:g} and {high:g}"
                raise EngineError(f"{name} must be {kind}{bounds}, not {_shown(value)}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @cached_property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @cached_property
    def adjusts(self) -> bool:
        """Whether logits are changed before sampling, not counting a guide's masks."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.logit_bias or self.min_tokens)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_between(value: object, low: float | None, high: float | None) -> bool:
    """Whether `value` is a finite number within the bounds; None is no bound."""
    if not (_is_whole(value) or (isinstance(value, float) and math.isfinite(value))):
        return False
    return (low is None or value >= low) and (high is None or value <= high)  # type: ignore[operator]


def _shown(value: object) -> str:
    """A value for a message, without printing thousands of digits."""
    return "one of many digits" if _is_whole(value) and abs(value) >= 10**20 else repr(value)
