"""/v1/responses: text and function calls in and out. Nothing is stored, so every request has the whole conversation.

It runs on chat: the input becomes messages, and what chat's parsers find in the answer becomes items.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from leanseek.engine import EngineStopped, RequestFailed
from leanseek.errors import InputError
from leanseek.server.chat import begin_chat
from leanseek.server.errors import ApiError, as_api_error
from leanseek.server.events import EventStream
from leanseek.server.parsers import Parser, ToolDelta
from leanseek.server.schema import (
    ChatRequest,
    Function,
    FunctionCall,
    FunctionChoice,
    InputCall,
    InputCallOutput,
    InputMessage,
    InputReasoning,
    JsonSchema,
    Message,
    NamedFunction,
    NamedTool,
    ResponsesRequest,
    Sampling,
    TextFormat,
    Tool,
    ToolCall,
)
from leanseek.server.service import Generation, Service, new_id

Event = dict[str, Any]


async def responses(service: Service, request: ResponsesRequest) -> dict[str, Any] | EventStream:
    """Answer an input, whole or as events.

    Raises:
        ApiError, InputError, QueueFull, EngineStopped: before anything has been generated.
    """
    generation, (parser,) = await begin_chat(service, _as_chat(request), "text.format")
    answer = _Answer(service, request, generation, parser)
    if request.stream:
        return EventStream(generation, answer.events(), done=False)
    async for _ in answer.events():
        pass
    if answer.error:
        raise answer.error
    return answer.response


# ---- the request as a chat request ----


def _as_chat(request: ResponsesRequest) -> ChatRequest:
    """The chat request with the same answer."""
    sampling = {name: getattr(request, name) for name in request.model_fields_set & Sampling.model_fields.keys()}
    return ChatRequest(
        **sampling,
        messages=_messages(request),
        max_completion_tokens=request.max_output_tokens,
        response_format=_format(request),
        tools=_tools(request),
        tool_choice=_choice(request),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        chat_template_kwargs=request.chat_template_kwargs,
    )


def _format(request: ResponsesRequest) -> TextFormat | None:
    form = request.text.format if request.text else None
    if form is None:
        return None
    schema = JsonSchema(name=form.name or "output", schema=form.schema_)
    return TextFormat(type=form.type, json_schema=schema if form.type == "json_schema" else None)


def _choice(request: ResponsesRequest) -> Literal["none", "auto", "required"] | NamedTool | None:
    choice = request.tool_choice
    if isinstance(choice, FunctionChoice):
        return NamedTool(type="function", function=NamedFunction(name=choice.name))
    return choice


def _tools(request: ResponsesRequest) -> list[Tool] | None:
    if request.tools is None:
        return None
    described = [tool.model_dump(exclude={"type"}, exclude_unset=True, exclude_none=True) for tool in request.tools]
    return [Tool(type="function", function=Function(**function)) for function in described]


def _messages(request: ResponsesRequest) -> list[Message]:
    """The conversation, instructions first. Reasoning, text and calls of one model turn become one message."""
    messages: list[Message] = []
    if request.instructions:
        messages.append(Message(role="system", content=request.instructions))
    items = [InputMessage(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    turn: dict[str, Any] = {}  # of the model
    for item in items:
        ends_turn = isinstance(item, InputCallOutput) or (isinstance(item, InputMessage) and item.role != "assistant")
        if turn and (ends_turn or (isinstance(item, InputMessage | InputReasoning) and turn.keys() & _SAID)):
            messages += _turn(turn)
            turn = {}
        match item:
            case InputReasoning():
                parts = item.content or item.summary or []
                turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(part.text for part in parts)
            case InputCall():
                function = FunctionCall(name=item.name, arguments=item.arguments)
                turn.setdefault("tool_calls", []).append(ToolCall(id=item.call_id, type="function", function=function))
            case InputCallOutput():
                messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
            case InputMessage(role="assistant"):
                turn["content"] = item.content
            case InputMessage():
                messages.append(Message(role=item.role, content=item.content))
    messages += _turn(turn)
    if len(messages) == bool(request.instructions):
        raise ApiError(400, "input has no message", param="input")
    return messages


_SAID = {"content", "tool_calls"}  # a model turn needs one of these; reasoning alone is not a turn


def _turn(said: dict[str, Any]) -> list[Message]:
    return [Message(role="assistant", **said)] if said.keys() & _SAID else []


# ---- the answer as items ----


class _Answer:
    """Builds the response event by event."""

    def __init__(self, service: Service, request: ResponsesRequest, generation: Generation, parser: Parser):
        self._generation = generation
        self._parser = parser
        self._numbers = itertools.count()
        self._open: dict[str, Any] | None = None  # the output item being written
        self.error: ApiError | None = None
        self.response: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": service.model_name,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}} | (_plain(request.text) if request.text else {}),
            "tool_choice": _plain(request.tool_choice) if request.tool_choice else "auto",
            "tools": [{"parameters": None, "strict": None} | _plain(tool) for tool in request.tools or []],
            "top_p": request.top_p,
            "usage": None,
        }

    async def events(self) -> AsyncIterator[Event]:
        """The events of the stream; after the last one, `response` is complete."""
        yield self._event("response.created", response=dict(self.response))
        yield self._event("response.in_progress", response=dict(self.response))
        reason = None
        try:
            async for _, delta in self._generation:
                parsed = self._parser.feed(delta.text, delta.finish_reason is not None)
                for kind, text in (("reasoning", parsed.reasoning), ("message", parsed.content)):
                    if text:
                        for event in self._write(kind, text):
                            yield event
                for call in parsed.tool_calls:
                    for event in self._call(call):
                        yield event
                reason = delta.finish_reason
        except (InputError, RequestFailed, EngineStopped) as error:
            self.error = as_api_error(error)
        for event in self._close("completed" if reason == "stop" else "incomplete"):
            yield event
        self._finish(reason)
        yield self._event(f"response.{self.response['status']}", response=self.response)

    def _finish(self, reason: str | None) -> None:
        usage = self._generation.usage
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._generation.reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }
        if self.error:
            code = "server_error" if self.error.status >= 500 else "invalid_prompt"  # OpenAI's codes
            self.response |= {"status": "failed", "error": {"code": code, "message": str(self.error)}}
        elif reason == "length":
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            self.response["status"] = "completed"

    def _event(self, kind: str, **values: Any) -> Event:
        return {"type": kind, "sequence_number": next(self._numbers), **values}

    def _item_event(self, kind: str, **values: Any) -> Event:
        """An event about the open item."""
        assert self._open
        place = {"item_id": self._open["id"], "output_index": len(self.response["output"]) - 1}
        return self._event(kind, **place, **values)

    def _part_event(self, kind: str, **values: Any) -> Event:
        """An event about the one part of the open item."""
        return self._item_event(kind, content_index=0, **values)

    def _open_item(self, item: dict[str, Any]) -> Event:
        """Add an item, still empty, and return its event."""
        self._open = item
        self.response["output"].append(item)
        index = len(self.response["output"]) - 1
        return self._event("response.output_item.added", output_index=index, item=dict(item))

    def _call(self, call: ToolDelta) -> list[Event]:
        """Events for a piece of a function call; the first piece has the name."""
        events: list[Event] = []
        if call.name is not None:
            item = {
                "id": new_id("fc_"),
                "type": "function_call",
                "call_id": call.id or new_id("call_"),
                "name": call.name,
                "arguments": "",
                "status": "in_progress",
            }
            events = [*self._close("completed"), self._open_item(item)]
        if call.arguments:
            assert self._open
            self._open["arguments"] += call.arguments
            events.append(self._item_event("response.function_call_arguments.delta", delta=call.arguments))
        return events

    def _write(self, kind: str, text: str) -> list[Event]:
        """Events for text in the open item, or in a new one if the open item is of another kind."""
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            events = [*self._close("completed"), *self._begin(kind)]
        assert self._open
        self._open["content"][0]["text"] += text
        if kind == "reasoning":
            return [*events, self._part_event("response.reasoning_text.delta", delta=text)]
        return [*events, self._part_event("response.output_text.delta", delta=text, logprobs=[])]

    def _begin(self, kind: str) -> list[Event]:
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item: dict[str, Any] = {"id": new_id("rs_"), "type": kind, "summary": []}
        else:
            part = {"type": "output_text", "text": "", "annotations": []}
            item = {"id": new_id("msg_"), "type": kind, "role": "assistant"}
        item |= {"status": "in_progress", "content": []}
        added = self._open_item(item)
        item["content"] = [part]
        return [added, self._part_event("response.content_part.added", part=dict(part))]

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        item = self._open
        item["status"] = status
        if item["type"] == "function_call":
            whole = {"name": item["name"], "arguments": item["arguments"]}
            done = [self._item_event("response.function_call_arguments.done", **whole)]
        else:
            part = item["content"][0]
            if item["type"] == "reasoning":
                done = [self._part_event("response.reasoning_text.done", text=part["text"])]
            else:
                done = [self._part_event("response.output_text.done", text=part["text"], logprobs=[])]
            done.append(self._part_event("response.content_part.done", part=dict(part)))
        index = len(self.response["output"]) - 1
        done.append(self._event("response.output_item.done", output_index=index, item=dict(item)))
        self._open = None
        return done


def _plain(value: Any) -> Any:
    """A request field, as the response repeats it."""
    return value if isinstance(value, str) else value.model_dump(by_alias=True, exclude_none=True)
