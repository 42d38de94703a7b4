"""An engine that says what it is told to: the protocol tests need no model.

It is not a judge of sampling. It keeps the parts of the engine's contract that the server relies on: deltas per choice,
stop strings, max_tokens, logprobs on request, usage and timing at the end, a bounded queue, and abort on close.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from leanseek.config import ModelConfig
from leanseek.engine import (
    Delta,
    EngineError,
    EngineStats,
    EngineStopped,
    QueueFull,
    RequestFailed,
    SamplingParams,
    Timing,
    Tokenizer,
    TokenLogprob,
    Usage,
)
from leanseek.engine.tokenizer import TextStream


class FakeStream:
    """One request: all its deltas are known from the start, and handed out one per `pause_s`."""

    def __init__(self, engine: FakeEngine, prompt: list[int], params: SamplingParams):
        self.prompt = prompt
        self.params = params
        self._engine = engine
        self._deltas = deque(delta for index in range(params.n) for delta in engine.script(prompt, params, index))

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if not self._deltas:
            self._engine.open.discard(self)
            raise StopAsyncIteration
        try:
            await asyncio.sleep(self._engine.pause_s)
        except asyncio.CancelledError:
            self.close()
            raise
        if self._engine.failure:
            self.close()
            raise RequestFailed(self._engine.failure)
        return self._deltas.popleft()

    def abort(self) -> None:
        self._deltas = deque([Delta("fake", finish_reason="abort")])

    def close(self) -> None:
        if self in self._engine.open:
            self._engine.open.discard(self)
            self._engine.aborted += bool(self._deltas)
            self._deltas.clear()


class FakeEngine:
    """Answers every prompt with `reply`, token by token."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int = 512):
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.config = ModelConfig(vocab_size=tokenizer.inner.get_vocab_size())
        self.forget()

    def forget(self) -> None:
        """As it was made: no request has been seen, and nothing was told."""
        self.defaults: dict[str, object] = {}
        self.alive = True
        self.reply = "Hello there, how are you?"
        self.tokens_per_delta = 1  # more, as with drafts
        self.pause_s = 0.0
        self.failure: str | None = None
        self.max_queue = 64
        self.capacity = 1024
        self.stopped = False
        self.open: set[FakeStream] = set()
        self.aborted = 0
        self.seen: list[FakeStream] = []

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        if not prompt:
            raise EngineError("the prompt is empty")
        if max(prompt) >= self.config.vocab_size:
            raise EngineError("a prompt token lies outside the vocabulary")

    @property
    def accepting(self) -> bool:
        return self.alive and not self.stopped

    def refuse(self) -> None:
        self.stopped = True

    def stop(self, timeout: float | None = None) -> None:
        self.stopped = True
        for stream in list(self.open):
            stream.abort()

    def matcher(self, params: SamplingParams) -> None:
        return None

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, priority: int = 0, matcher: object = None
    ) -> FakeStream:
        self.check(prompt, params)
        if self.stopped:
            raise EngineStopped("the engine takes no more requests")
        if len(self.open) >= self.max_queue:
            raise QueueFull(len(self.open), 2.5)
        stream = FakeStream(self, list(prompt), params)
        self.open.add(stream)
        self.seen.append(stream)
        return stream

    @property
    def last(self) -> FakeStream:
        return self.seen[-1]

    @property
    def last_prompt(self) -> str:
        return self.tokenizer.decode(self.last.prompt, skip_special_tokens=False)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.open),
            waiting=0,
            pages_total=100,
            pages_used=len(self.open),
            pages_cached=0,
            page_size=16,
            cache_bytes=4096,
            requests=len(self.seen),
            finished={"stop": len(self.seen), "abort": self.aborted},
            preemptions=0,
            prompt_tokens=sum(len(stream.prompt) for stream in self.seen),
            cached_tokens=0,
            generated_tokens=7,
            steps=7,
            forward_seconds=0.5,
            step_seconds=0.75,
            draft_tokens=[10],
            accepted_tokens=[8],
        )

    def script(self, prompt: list[int], params: SamplingParams, index: int) -> list[Delta]:
        text = TextStream(self.tokenizer, params.stop_strings, params.skip_special_tokens, False, params.spans)
        tokens = self.tokenizer.encode(self.reply, add_special_tokens=False)
        now = time.monotonic()
        deltas: list[Delta] = []
        for count, token in enumerate(tokens, start=1):
            delta, thought = Delta("fake", index, [token]), text.reasoning_tokens
            matched = text.add(token)
            delta.reasoning_tokens = text.reasoning_tokens - thought
            full = params.max_tokens is not None and count == params.max_tokens
            if matched or count == len(tokens) or full:
                delta.finish_reason = "stop" if matched or not full else "length"
                delta.usage = Usage(len(prompt), len(prompt) // 2, count, 2 * count, count)
                delta.timing = Timing(now, now + 0.01, now + 0.02, now + 0.02 + 0.01 * count)
            delta.text = text.take(final=delta.finish_reason is not None)
            if params.logprobs is not None:
                delta.logprobs = [_logprob(token, params.logprobs)]
            if params.prompt_logprobs is not None and index == 0 and count == 1:
                delta.prompt_logprobs = [None, *(_logprob(each, params.prompt_logprobs) for each in prompt[1:])]
            deltas.append(delta)
            if delta.finish_reason:
                break
        groups = range(0, len(deltas), self.tokens_per_delta)
        return [_joined(deltas[start : start + self.tokens_per_delta]) for start in groups]


def _joined(deltas: list[Delta]) -> Delta:
    """What one step with drafts tells at once."""
    first, last = deltas[0], deltas[-1]
    for delta in deltas[1:]:
        first.token_ids += delta.token_ids
        first.text += delta.text
        first.reasoning_tokens += delta.reasoning_tokens
        first.logprobs = first.logprobs and [*first.logprobs, *(delta.logprobs or [])]
    first.finish_reason, first.usage, first.timing = last.finish_reason, last.usage, last.timing
    return first


def _logprob(token: int, top: int) -> TokenLogprob:
    """The token is the likeliest; the next ids follow at half the probability each."""
    return TokenLogprob(token, -0.5, [(token + place, -0.5 - 0.7 * place) for place in range(top)])
