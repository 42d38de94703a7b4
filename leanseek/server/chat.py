"""/v1/chat/completions: conversations, reasoning, tools, structured output."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from leanseek.engine import Delta, Guide
from leanseek.server.errors import ApiError
from leanseek.server.events import EventStream
from leanseek.server.forms import (
    call_form,
    check_chat,
    check_form,
    forced_tools,
    form_or_calls,
    offered_tools,
    requested_form,
)
from leanseek.server.parsers import (
    END_THINK,
    THINK,
    ForcedCallParser,
    OutputParser,
    Parsed,
    Parser,
    ReasoningSplitter,
    ToolCallParser,
)
from leanseek.server.schema import ChatRequest, Object, Sampling
from leanseek.server.service import Generation, Service, begun_answer, chat_logprob, new_id

CLOSE_THINKING = "\n</think>\n\n"  # guided output cannot contain reasoning, so the prompt closes it


async def chat_completions(service: Service, request: ChatRequest) -> dict[str, Any] | EventStream:
    """Answer a conversation: n choices, whole or streamed.

    Raises:
        ApiError, InputError, QueueFull, EngineStopped: before anything has been generated.
    """
    generation, parsers = await begin_chat(service, request)
    answer = _Answer(service, request, generation, parsers)
    return EventStream(generation, answer.chunks()) if request.stream else await answer.whole()


async def begin_chat(
    service: Service, request: ChatRequest, form_option: str = "response_format"
) -> tuple[Generation, list[Parser]]:
    """Start answering a conversation. Returns the generation and a parser for each choice.

    form_option: the client's name for response_format

    Raises:
        ApiError, InputError, QueueFull, EngineStopped: the request cannot be served.
    """
    service.check_model(request.model)
    check_chat(request)
    tools = offered_tools(request)
    forced = forced_tools(request, tools)
    written = service.template.family.tools if tools else None  # the model's syntax for calls
    held = requested_form(request.response_format, request.structured_outputs, form_option)
    if forced:  # response_format is about content, which a call does not have
        held = call_form(forced)
    elif held and tools:
        held = form_or_calls(held, tools, written, request.parallel_tool_calls is not False, service.tokenizer)
    check_form(held, request, request.chat_template_kwargs)
    guide = held.guide if held else None
    begun = begun_answer(request.messages, request)
    if begun is not None and held:
        message = (
            f"{held.option} cannot be combined with continuing a message: a form starts a new answer; leave one out"
        )
        raise ApiError(400, message, param=held.option)
    effort: Object = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
    prompt = await service.render(request.messages, tools, effort | (request.chat_template_kwargs or {}), request)
    prompt, opened = thinking_state(prompt, guide, begun or "")
    most = 1 if request.parallel_tool_calls is False else None
    split = [
        OutputParser(reasoning_splitter(service, opened, guide), ToolCallParser(written, most) if written else None)
        for _ in range(max(1, request.n or 1))
    ]
    generation = await generate_chat(
        service,
        request,
        prompt,
        request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens,
        n=request.n,
        guided=guide,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        spans=None if guide else split[0].spans,
    )
    names = [tool.function.name for tool in forced or []]
    return generation, [ForcedCallParser(names) if forced else parser for parser in split]


async def generate_chat(
    service: Service, request: Sampling, prompt: str, max_tokens: int | None, **more: Any
) -> Generation:
    """Start generating after a rendered conversation.

    Raises:
        ApiError, EngineError, QueueFull, EngineStopped: the request cannot be served.
    """
    ids = await service.encode(prompt, add_special_tokens=False)  # the template has added them
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if not more.get("guided"):  # a form ends by itself
        stop = [*stop, *service.template.stop]
    params = service.sampling(request, len(ids), max_tokens, stop=stop, **more)
    return await service.generate([(ids, params)], request.priority)


def thinking_state(prompt: str, guide: Guide | None, begun: str = "") -> tuple[str, bool]:
    """The prompt, with reasoning closed if the output is guided, and whether the answer begins inside reasoning.

    begun: the part of the answer that the prompt already contains, at its end
    """
    opened = prompt.removesuffix(begun).rstrip().endswith(THINK)
    if THINK in begun or END_THINK in begun:
        opened = begun.rfind(THINK) > begun.rfind(END_THINK)
    if opened and guide:
        return prompt.rstrip() + CLOSE_THINKING, False
    return prompt, opened


def reasoning_splitter(service: Service, opened: bool, guide: Guide | None) -> ReasoningSplitter | None:
    """A splitter if the answer may contain reasoning, else None."""
    return ReasoningSplitter(opened) if (opened or service.template.reasons) and not guide else None


class _Answer:
    """Turns the engine's deltas into OpenAI's objects."""

    def __init__(self, service: Service, request: ChatRequest, generation: Generation, parsers: list[Parser]):
        self._service = service
        self._request = request
        self._generation = generation
        self._parsers = parsers
        self._called = [False] * len(parsers)
        self._id = new_id("chatcmpl-")
        self._created = int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._service.model_name,
            "choices": choices,
            "usage": usage,
        }

    def _parse(self, delta: Delta) -> Parsed:
        parsed = self._parsers[delta.index].feed(delta.text, delta.finish_reason is not None)
        self._called[delta.index] |= bool(parsed.tool_calls)
        return parsed

    def _finish_reason(self, delta: Delta) -> str | None:
        called = self._called[delta.index] and delta.finish_reason == "stop"
        return "tool_calls" if called else delta.finish_reason

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        top = self._request.top_logprobs or 0
        return [chat_logprob(self._service.tokenizer, entry, top) for entry in delta.logprobs or []]

    async def whole(self) -> dict[str, Any]:
        """The `chat.completion` object."""
        choices = [_Choice(index) for index in range(len(self._parsers))]
        async for _, delta in self._generation:
            choice = choices[delta.index]
            choice.add(self._parse(delta))
            choice.logprobs += self._logprobs(delta)
            choice.finish_reason = self._finish_reason(delta)
        listed = [choice.object(bool(self._request.logprobs)) for choice in choices]
        return self._object("chat.completion", listed, self._generation.usage)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The `chat.completion.chunk` objects."""
        begun: set[int] = set()
        async for _, delta in self._generation:
            if delta.index not in begun:
                begun.add(delta.index)
                yield self._chunk(delta.index, {"role": "assistant", "content": ""})
            parsed = self._parse(delta)
            logprobs = self._logprobs(delta)
            pieces = parsed.pieces()
            for number, piece in enumerate(pieces, start=1):  # a chunk for each kind
                last = number == len(pieces)
                here = len(logprobs) if last else delta.reasoning_tokens if piece.reasoning else 0
                yield self._chunk(
                    delta.index, _delta_object(piece), logprobs[:here], self._finish_reason(delta) if last else None
                )
                logprobs = logprobs[here:]
            if not pieces and (logprobs or delta.finish_reason):
                yield self._chunk(delta.index, {}, logprobs, self._finish_reason(delta))
        if self._request.stream_options and self._request.stream_options.include_usage:
            yield self._object("chat.completion.chunk", [], self._generation.usage)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": finish_reason,
        }
        usage = self._generation.usage_so_far(self._request.stream_options)
        return self._object("chat.completion.chunk", [choice], usage)


class _Choice:
    """One choice of an answer that is not streamed."""

    def __init__(self, index: int):
        self._index = index
        self._reasoning = ""
        self._content = ""
        self._calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def add(self, parsed: Parsed) -> None:
        self._reasoning += parsed.reasoning
        self._content += parsed.content
        for call in parsed.tool_calls:
            if call.name is not None:
                function = {"name": call.name, "arguments": ""}
                self._calls.append({"id": call.id or new_id("call_"), "type": "function", "function": function})
            self._calls[-1]["function"]["arguments"] += call.arguments

    def object(self, with_logprobs: bool) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message |= {"content": self._content or None, "tool_calls": self._calls}
        return {
            "index": self._index,
            "message": message,
            "logprobs": {"content": self.logprobs, "refusal": None} if with_logprobs else None,
            "finish_reason": self.finish_reason,
        }


def _delta_object(parsed: Parsed) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if parsed.reasoning:
        delta["reasoning_content"] = parsed.reasoning
    if parsed.content:
        delta["content"] = parsed.content
    if parsed.tool_calls:
        delta["tool_calls"] = []
    for call in parsed.tool_calls:
        function = {"arguments": call.arguments}
        piece: dict[str, Any] = {"index": call.index, "function": function}
        if call.name is not None:
            piece |= {"id": call.id or new_id("call_"), "type": "function"}
            function["name"] = call.name
        delta["tool_calls"].append(piece)
    return delta
