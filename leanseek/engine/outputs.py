"""What the engine returns: deltas while a request runs, outputs when it is done, statistics at any time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprob(NamedTuple):
    """A token's log-probability under the model, and the most likely alternatives in descending order."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Usage:
    """Token counts of one choice."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens found in the prefix cache
    completion_tokens: int
    draft_tokens: int  # proposed by the MTP module
    accepted_tokens: int  # drafts kept


@dataclass(frozen=True)
class Timing:
    """Seconds of time.monotonic(); 0 for events that did not happen."""

    arrived: float
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(slots=True)
class Delta:
    """What one step added to one choice of a request."""

    request_id: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""  # whole characters; text that may be the start of a stop string is held back
    logprobs: list[TokenLogprob] | None = None  # one per token id, if requested
    prompt_logprobs: list[TokenLogprob | None] | None = None  # on choice 0's first delta, if requested
    sampled_logprobs: list[float] = field(default_factory=list)  # one per token id, if requested
    reasoning_tokens: int = 0  # known to be reasoning by now; needs SamplingParams.spans
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop id or string; None for the end-of-sequence token
    error: str | None = None
    refused: bool = False  # the error is the request's fault, not ours
    usage: Usage | None = None  # with finish_reason
    timing: Timing | None = None  # with finish_reason


@dataclass
class CompletionOutput:
    """One choice, complete."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[TokenLogprob] | None
    usage: Usage
    timing: Timing
    sampled_logprobs: list[float] = field(default_factory=list)


@dataclass
class RequestOutput:
    """A request with all its choices."""

    request_id: str
    prompt: str | None  # None if the prompt was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; counters start when the engine is created."""

    running: int
    waiting: int
    pages_total: int
    pages_used: int  # held by a request
    pages_cached: int  # free, but still holding a known prefix
    page_size: int
    cache_bytes: int
    requests: int
    finished: dict[str, int]  # choices by finish reason
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    forward_seconds: float  # in the model's layers and head
    step_seconds: float  # in whole steps, including scheduling and sampling
    draft_tokens: list[int]  # proposed, per draft position
    accepted_tokens: list[int]  # kept, per draft position
