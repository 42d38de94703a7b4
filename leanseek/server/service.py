"""What the endpoints share: requests become prompts and sampling parameters, and the engine's deltas come back."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from leanseek.engine import (
    AsyncEngine,
    Delta,
    EngineStopped,
    SamplingParams,
    Stream,
    Tokenizer,
    TokenLogprob,
)
from leanseek.engine.confined import LANES
from leanseek.server.errors import ApiError
from leanseek.server.metrics import Metrics
from leanseek.server.schema import Message, Object, Sampling, StreamOptions, Tool
from leanseek.server.templates import ChatTemplate

T = TypeVar("T")

MIN_LOGPROB = -9999.0  # JSON has no infinity

# Fields of a request that are the engine's under the same name.
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


@dataclass
class Service:
    """One model, served."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    template: ChatTemplate
    model_name: str
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    # Templates and guides may keep a thread waiting for seconds: not those that everything else uses.
    _templates: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(LANES, "template"))
    _guides: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(LANES, "guide"))

    def close(self) -> None:
        """Let go of what still waits for a template or a guide."""
        self.template.close()
        self._templates.shutdown(wait=False, cancel_futures=True)
        self._guides.shutdown(wait=False, cancel_futures=True)

    async def _apart(self, pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(function, *arguments))

    def check_model(self, name: str | None) -> None:
        """Raises ApiError: the request is for another model."""
        if name is not None and name != self.model_name:
            message = f"the model {name!r} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids; in a thread, because a long text takes long.

        Raises:
            ApiError: the text is so long that it could not fit whatever its tokens; splitting 16 MB takes seconds.
        """
        least = self.tokenizer.least_tokens(text)
        if least >= self.engine.max_model_len:
            message = (
                f"the text has at least {least} tokens; the context is {self.engine.max_model_len}, answer included"
            )
            raise ApiError(400, message, code="context_length_exceeded")
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: Object | None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt of a conversation.

        Raises:
            TemplateError: the template refuses the messages.
        """
        return await self._apart(
            self._templates,
            self.template.render,
            [_for_template(message) for message in messages],
            [tool.model_dump(exclude_none=True) for tool in tools or []] or None,
            variables,
            add_generation_prompt,
        )

    def sampling(self, request: Sampling, prompt_length: int, max_tokens: int | None, **more: Any) -> SamplingParams:
        """The engine's parameters: the model's defaults, under what the request says, under `more` (where not None).

        `max_tokens` beyond the context means to the end of it.

        Raises:
            ApiError: the prompt fills the context.
            EngineError: a value out of its range.
        """
        room = self.engine.max_model_len - prompt_length
        if room < 1:
            context = f"the context is {self.engine.max_model_len}, answer included"
            raise ApiError(400, f"the prompt has {prompt_length} tokens; {context}", code="context_length_exceeded")
        values = {"max_tokens": max_tokens} | self.engine.defaults
        values |= {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
        values["stop"] = request.stop
        values |= {name: value for name, value in more.items() if value is not None}
        if max_tokens is not None:
            values["max_tokens"] = max_tokens
        if values["max_tokens"] is not None:
            values["max_tokens"] = min(values["max_tokens"], room)
        return SamplingParams(**values)

    async def generate(self, requests: Sequence[tuple[list[int], SamplingParams]], priority: int) -> Generation:
        """Submit requests, all or none.

        Raises:
            EngineError, QueueFull, EngineStopped: as the engine's `submit`.
            ApiError: more requests than would ever be taken at once.
        """
        if len(requests) > self.engine.capacity:
            raise ApiError(400, f"{len(requests)} prompts at once; this server takes {self.engine.capacity}")
        for prompt, params in requests:
            self.engine.check(prompt, params)
        params = requests[0][1]  # those of one answer share their guide
        matcher = await self._apart(self._guides, self.engine.matcher, params) if params.guided else None
        streams: list[Stream] = []
        try:
            for prompt, params in requests:
                streams.append(self.engine.submit(prompt, params, priority, matcher=matcher))
        except Exception:
            for stream in streams:
                stream.close()
            raise
        return Generation(streams, self.metrics, sum(len(prompt) for prompt, _ in requests))


class Generation:
    """The deltas of requests that belong to one answer, and their count. Iterate once; `close` ends what still runs."""

    def __init__(self, streams: Sequence[Stream], metrics: Metrics, prompt_tokens: int):
        self._streams = streams
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._cached = self._completion = self._drafts = self._accepted = 0
        self.reasoning_tokens = 0

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """(which request, delta): requests one after the other, though they run together.

        Raises:
            RequestFailed, EngineStopped: the engine ended a request.
        """
        try:
            for number, stream in enumerate(self._streams):
                async for delta in stream:
                    if delta.finish_reason == "abort":
                        raise EngineStopped("the server is stopping")
                    self._completion += len(delta.token_ids)
                    self.reasoning_tokens += delta.reasoning_tokens
                    if delta.usage:
                        self._drafts += delta.usage.draft_tokens
                        self._accepted += delta.usage.accepted_tokens
                        self._cached += delta.usage.cached_tokens if delta.index == 0 else 0
                        self._metrics.observe(delta)
                    yield number, delta
        finally:
            self.close()

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    def usage_so_far(self, options: StreamOptions | None) -> dict[str, Any] | None:
        """`usage` of a chunk, where every chunk shall have it."""
        return self.usage if options and options.continuous_usage_stats else None

    @property
    def usage(self) -> dict[str, Any]:
        """As OpenAI reports it. A "prediction" is the MTP module's: tokens it drafted, accepted or not."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt_tokens + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "accepted_prediction_tokens": self._accepted,
                "rejected_prediction_tokens": self._drafts - self._accepted,
            },
        }


def new_id(kind: str) -> str:
    return f"{kind}{secrets.token_hex(12)}"


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as logprobs name it.

    A part of a character is spelled `bytes:\\xe2\\x82`, as OpenAI does, and an id without a token `token_id:5`: neither
    may share a name with another.
    """
    spelled = tokenizer.token_bytes(token)
    try:
        return spelled.decode() or f"token_id:{token}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def chat_logprob(tokenizer: Tokenizer, entry: TokenLogprob, top: int) -> dict[str, Any]:
    """A token's log-probability as chat and responses report it."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        spelled = list(tokenizer.token_bytes(token))
        return {"token": token_text(tokenizer, token), "logprob": max(logprob, MIN_LOGPROB), "bytes": spelled}

    alternatives = [one(*other) for other in entry.top[:top]]
    return one(entry.token_id, entry.logprob) | {"top_logprobs": alternatives}


def _for_template(message: Message) -> dict[str, Any]:
    """A message with a text, as templates expect: beside tool calls None where empty, as the published V3's wants."""
    plain = message.model_dump(exclude_none=True)
    calls = message.role == "assistant" and message.tool_calls
    if not calls:
        plain.pop("tool_calls", None)
    parts = message.content if isinstance(message.content, list) else []
    text = "".join(part.text for part in parts) if parts else message.content or ""
    plain["content"] = text or (None if calls else "")
    if message.role == "developer":
        plain["role"] = "system"
    return plain
