"""/v1/completions: one or more prompts, as text or tokens; echo with logprobs; fill in the middle."""

from __future__ import annotations

import codecs
import dataclasses
import time
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, NamedTuple

from leanseek.engine import Delta, Tokenizer, TokenLogprob
from leanseek.server.errors import ApiError
from leanseek.server.events import EventStream
from leanseek.server.forms import check_completion, check_form, requested_form
from leanseek.server.schema import CompletionRequest
from leanseek.server.service import (
    MIN_LOGPROB,
    Generation,
    Service,
    new_id,
    token_text,
)

DEFAULT_MAX_TOKENS = 16  # OpenAI's
_FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")  # prefix, suffix, middle: section 4.1 of the report


async def completions(service: Service, request: CompletionRequest) -> dict[str, Any] | EventStream:
    """Continue each prompt with n choices, prompt by prompt, whole or streamed.

    Raises:
        ApiError, InputError, QueueFull, EngineStopped: before anything has been generated.
    """
    service.check_model(request.model)
    check_completion(request)
    prompts = [await _prompt_ids(service, prompt, request.suffix) for prompt in _listed(request.prompt)]
    form = requested_form(request.response_format, request.structured_outputs)
    check_form(form, request)
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    requests = [
        (
            ids,
            service.sampling(
                request,
                len(ids),
                max(1, max_tokens),  # 0 requests only the prompt's logprobs: one token is generated and dropped
                n=request.n,
                guided=form.guide if form else None,
                logprobs=request.logprobs,
                prompt_logprobs=request.logprobs if request.echo else None,
            ),
        )
        for ids in prompts
    ]
    generation = await service.generate(requests, request.priority, keep_tokens=max_tokens > 0)
    answer = _Answer(service, request, generation, prompts, keep_tokens=max_tokens > 0)
    return EventStream(generation, answer.chunks()) if request.stream else await answer.whole()


def _listed(prompt: str | Sequence[int] | Sequence[str | list[int]]) -> list[str | list[int]]:
    """The prompts as a list; a list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(each, int) for each in prompt):
        return [[each for each in prompt if isinstance(each, int)]]
    return [each for each in prompt if not isinstance(each, int)]


async def _prompt_ids(service: Service, prompt: str | list[int], suffix: str | None) -> list[int]:
    if suffix is None:
        return prompt if isinstance(prompt, list) else await service.encode(prompt, add_special_tokens=True)
    if isinstance(prompt, list):
        raise ApiError(400, "suffix needs a text prompt", param="suffix")
    begin, hole, end = _FIM
    if any(service.tokenizer.inner.token_to_id(mark) is None for mark in _FIM):
        raise ApiError(400, "suffix needs a model with fill-in-the-middle tokens; this one has none", param="suffix")
    return await service.encode(f"{begin}{prompt}{hole}{suffix}{end}", add_special_tokens=True)


class _Entry(NamedTuple):
    token: int
    logprob: TokenLogprob | None
    offset: int  # in the text of the choice


@dataclasses.dataclass
class _Choice:
    """A choice, or a chunk of one."""

    index: int
    text: str = ""
    entries: list[_Entry] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None


class _Offsets:
    """Where each token of one choice begins in the returned text.

    A token that is part of a character begins where the character does. A token cut off by a stop string begins at the
    end of the text, so an entry waits until the text before it has been returned.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Collection[int]):
        self._tokenizer = tokenizer
        self._skipped = skipped  # tokens left out of the text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._place = 0  # characters of all tokens so far
        self._given = 0  # characters of text returned so far
        self._waiting: list[_Entry] = []

    def add(self, text: str, entries: Sequence[tuple[int, TokenLogprob | None]], final: bool) -> list[_Entry]:
        """Add text and tokens; return the entries whose offset is known now (all of them if `final`)."""
        self._given += len(text)
        for token, logprob in entries:
            self._waiting.append(_Entry(token, logprob, self._place))
            if token not in self._skipped:
                self._place += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        if final:
            ready, self._waiting = self._waiting, []
            return [entry._replace(offset=min(entry.offset, self._given)) for entry in ready]
        count = sum(entry.offset <= self._given for entry in self._waiting)
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return ready

    def begin_answer(self) -> None:
        """The prompt has ended; drop an incomplete character at its end."""
        self._place = self._given
        self._decoder.reset()


class _Answer:
    """Turns the engine's deltas into OpenAI's objects."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        generation: Generation,
        prompts: Sequence[list[int]],
        keep_tokens: bool,
    ):
        self._service = service
        self._request = request
        self._generation = generation
        self._prompts = prompts
        self._keep_tokens = keep_tokens
        self._n = request.n or 1
        self._skip_special = request.skip_special_tokens is not False
        self._prompt_logprobs: Sequence[TokenLogprob | None] = []  # of the prompt whose choices are being returned
        self._echoed: set[int] = set()
        skipped = service.tokenizer.special_ids if self._skip_special else frozenset()
        self._offsets = [_Offsets(service.tokenizer, skipped) for _ in range(len(prompts) * self._n)]
        self._id = new_id("cmpl-")
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The `text_completion` object."""
        choices = [_Choice(index) for index in range(len(self._prompts) * self._n)]
        async for number, delta in self._generation:
            for piece in self._pieces(number, delta):
                choice = choices[piece.index]
                choice.text += piece.text
                choice.entries += piece.entries
                choice.finish_reason = piece.finish_reason
        return self._object([self._choice_object(choice) for choice in choices], self._generation.usage)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The same object, piece by piece."""
        options = self._request.stream_options
        async for number, delta in self._generation:
            for piece in self._pieces(number, delta):
                if piece.text or piece.entries or piece.finish_reason:
                    yield self._object([self._choice_object(piece)], self._generation.usage_so_far(options))
        if options and options.include_usage:
            yield self._object([], self._generation.usage)

    def _pieces(self, number: int, delta: Delta) -> list[_Choice]:
        """What a delta adds: the prompt first if it is echoed, then the text."""
        index = number * self._n + delta.index
        pieces = []
        if self._request.echo and index not in self._echoed:
            self._echoed.add(index)
            pieces.append(self._echo(number, index, delta))
        piece = _Choice(index, finish_reason=delta.finish_reason)
        if self._keep_tokens:
            piece.text = delta.text
            entries = list(zip(delta.token_ids, delta.logprobs or [], strict=False))
            piece.entries = self._offsets[index].add(delta.text, entries, final=delta.finish_reason is not None)
        return [*pieces, piece]

    def _echo(self, number: int, index: int, delta: Delta) -> _Choice:
        ids = self._prompts[number]
        if delta.index == 0:  # the choice that carries the prompt's logprobs
            self._prompt_logprobs = delta.prompt_logprobs or []
        text = self._service.tokenizer.decode(ids, self._skip_special)
        entries = list(zip(ids, self._prompt_logprobs, strict=False))
        choice = _Choice(index, text, self._offsets[index].add(text, entries, final=True))
        self._offsets[index].begin_answer()
        return choice

    def _object(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_name,
            "choices": choices,
            "usage": usage,
        }

    def _choice_object(self, choice: _Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice) if self._request.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, choice: _Choice) -> dict[str, Any]:
        return {
            "tokens": [token_text(self._service.tokenizer, entry.token) for entry in choice.entries],
            "token_logprobs": [each and max(each.logprob, MIN_LOGPROB) for _, each, _ in choice.entries],
            "top_logprobs": [each and self._top(each) for _, each, _ in choice.entries],
            "text_offset": [entry.offset for entry in choice.entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens, and the generated one even if it is not among them."""
        shown = [*entry.top[: self._request.logprobs], (entry.token_id, entry.logprob)]
        return {token_text(self._service.tokenizer, token): max(value, MIN_LOGPROB) for token, value in shown}
