"""Shared by the endpoints: turns requests into prompts and sampling parameters, and returns the engine's deltas."""

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
    TooLong,
)
from leanseek.engine.confined import LANES
from leanseek.server.errors import ApiError
from leanseek.server.metrics import Metrics
from leanseek.server.schema import (
    MOST_TOKENS,
    Content,
    Ending,
    Message,
    Object,
    RefusalPart,
    Sampling,
    StreamOptions,
    TextPart,
    Tool,
)
from leanseek.server.templates import ChatTemplate

T = TypeVar("T")

MIN_LOGPROB = -9999.0  # JSON has no infinity
LONG_TEXT = 2**17  # characters: longer texts encode slowly and get threads of their own

# Request fields that the engine's SamplingParams have under the same name.
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
    """One served model."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    template: ChatTemplate
    model_name: str
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    # Templates and guides can block a thread for seconds, so they get threads of their own.
    _templates: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(LANES, "template"))
    _guides: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(LANES, "guide"))
    _long_texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "text"))
    _texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "text"))

    def close(self) -> None:
        """Drop requests that still wait for a template or a guide."""
        self.template.close()
        for pool in (self._templates, self._guides, self._long_texts, self._texts):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _apart(self, pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(function, *arguments))

    def check_model(self, name: str | None) -> None:
        """Raises ApiError if the request names another model."""
        if name is not None and name != self.model_name:
            message = f"the model {name!r} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str, add_special_tokens: bool, whole: bool = False) -> list[int]:
        """Token ids of a text, computed in a thread because a long text takes long.

        whole: encode all of the text, up to MOST_TOKENS, even if it exceeds the context

        Raises:
            EngineError: the tokenizer cannot encode the text.
            ApiError: the text is much longer than the context; encoding 16 MB would take seconds.
        """
        most = self.engine.max_model_len
        bound = f"the context is {most}, answer included"
        if whole and most < MOST_TOKENS:
            most, bound = MOST_TOKENS, f"at most {MOST_TOKENS} are returned"
        least = self.tokenizer.least_tokens(text)
        try:
            if least >= most:
                raise TooLong
            pool = self._long_texts if len(text) > LONG_TEXT else self._texts
            ids = await self._apart(pool, self.tokenizer.encode, text, add_special_tokens, most)
            if whole and len(ids) > most:  # `encode` checks only before each part
                raise TooLong
            return ids
        except TooLong:
            message = f"the text has at least {max(least, most)} tokens; {bound}"
            raise ApiError(400, message, code="context_length_exceeded") from None

    async def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: Object | None,
        ending: Ending,
    ) -> str:
        """The prompt of a conversation.

        Raises:
            TemplateError: the template refuses the messages.
            ApiError: the fields about its ending contradict each other.
        """
        continued = begun_answer(messages, ending) is not None
        return await self._apart(
            self._templates,
            self.template.render,
            [_for_template(message, self.template.takes_parts) for message in messages],
            [tool.given() for tool in tools or []] or None,
            variables,
            ending.add_generation_prompt is not False,
            continued,
        )

    def sampling(self, request: Sampling, prompt_length: int, max_tokens: int | None, **more: Any) -> SamplingParams:
        """The engine's parameters: the model's defaults, overridden by the request, then by `more` (except None).

        `max_tokens` is cut to the room left in the context.

        Raises:
            ApiError: the prompt fills the context.
            EngineError: a value is out of its range.
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

    async def generate(
        self, requests: Sequence[tuple[list[int], SamplingParams]], priority: int, keep_tokens: bool = True
    ) -> Generation:
        """Submit all requests, or none. keep_tokens: whether the client gets the generated tokens.

        Raises:
            EngineError, QueueFull, EngineStopped: see the engine's `submit`.
            ApiError: there are more requests than the engine ever takes at once.
        """
        if len(requests) > self.engine.capacity:
            raise ApiError(400, f"{len(requests)} prompts in one request; this server takes {self.engine.capacity}")
        for prompt, params in requests:
            self.engine.check(prompt, params)
        params = requests[0][1]  # all requests of one answer share a guide
        matcher = await self._apart(self._guides, self.engine.matcher, params) if params.guided else None
        streams: list[Stream] = []
        try:
            for prompt, params in requests:
                streams.append(self.engine.submit(prompt, params, priority, matcher=matcher))
        except Exception:
            for stream in streams:
                stream.close()
            raise
        return Generation(streams, self.metrics, sum(len(prompt) for prompt, _ in requests), keep_tokens)


class Generation:
    """The deltas and token counts of one answer's requests. Iterate once; `close` ends those still running."""

    def __init__(self, streams: Sequence[Stream], metrics: Metrics, prompt_tokens: int, keep_tokens: bool):
        self._streams = streams
        self._keep_tokens = keep_tokens
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._cached = self._completion = self._drafts = self._accepted = 0
        self.reasoning_tokens = 0

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yields (request index, delta), one request after the other, though they run together.

        Raises:
            EngineError, RequestFailed, EngineStopped: the engine ended a request.
        """
        try:
            for number, stream in enumerate(self._streams):
                async for delta in stream:
                    if delta.finish_reason == "abort":
                        raise EngineStopped("the server is stopping")
                    self._completion += len(delta.token_ids) * self._keep_tokens
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
        """`usage` for a chunk, if the client wants it in every chunk."""
        return self.usage if options and options.continuous_usage_stats else None

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts in OpenAI's format. "Prediction" tokens are the MTP module's drafts, accepted or not."""
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
    """A token's name in logprobs.

    Part of a character is named `bytes:\\xe2\\x82`, as in OpenAI's API, and an id without a token `token_id:5`, so that
    no two ids share such a name.
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


def begun_answer(messages: Sequence[Message], ending: Ending) -> str | None:
    """The text of the last message if the answer continues it; None if a new message begins.

    Raises:
        ApiError: the fields about this contradict each other, or the last message is not an answer.
    """
    *earlier, last = messages
    if any(message.prefix for message in earlier):
        raise ApiError(400, "prefix belongs to the last message", param="messages")
    if not (last.prefix or ending.continue_final_message):
        return None
    name = "prefix" if last.prefix else "continue_final_message"
    if last.prefix and ending.continue_final_message is False:
        raise ApiError(400, "prefix: true contradicts continue_final_message: false", param="continue_final_message")
    if ending.add_generation_prompt:
        message = f"{name} continues the last message, add_generation_prompt begins a new one: send only one of them"
        raise ApiError(400, message, param="add_generation_prompt")
    if last.role != "assistant" or last.tool_calls:
        message = f"{name} needs a last message from the assistant, without tool_calls"
        raise ApiError(400, message, param="messages")
    return content_text(last.content or "")


def content_text(content: Content) -> str:
    """A message's text: its parts joined, refusals included."""
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)


def _for_template(message: Message, takes_parts: bool) -> dict[str, Any]:
    """A message as templates expect it: no nulls (except as the content beside calls), no empty list of calls, and
    parts only if the template reads them."""
    plain = message.given()
    if not message.tool_calls:
        plain.pop("tool_calls", None)
    if message.role == "developer":
        plain["role"] = "system"
    if message.content is None:
        plain["content"] = message.refusal or (None if message.tool_calls else "")
    elif isinstance(message.content, list) and takes_parts:
        plain["content"] = [_part(part) for part in message.content]
    else:
        plain["content"] = content_text(message.content)
    return plain


def _part(part: TextPart | RefusalPart) -> Object:
    """A part under the field names that templates read."""
    given = part.given() | {"type": "text"}
    return given | {"text": given.pop("refusal")} if isinstance(part, RefusalPart) else given
