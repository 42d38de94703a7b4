"""/v1/responses: text in, text and reasoning out. Nothing is stored, so a conversation comes whole each time."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

from leanseek.engine import EngineStopped, RequestFailed
from leanseek.server.chat import generate_chat, reasoning_splitter, thinking_state
from leanseek.server.errors import ApiError, as_api_error
from leanseek.server.events import EventStream
from leanseek.server.forms import check_form, requested_form
from leanseek.server.parsers import OutputParser
from leanseek.server.schema import InputMessage, JsonSchema, Message, ResponsesRequest, TextFormat
from leanseek.server.service import Generation, Service, new_id

Event = dict[str, Any]


async def responses(service: Service, request: ResponsesRequest) -> dict[str, Any] | EventStream:
    """Answer an input, whole or as events.

    Raises:
        ApiError, InputError, QueueFull, EngineStopped: before anything has been generated.
    """
    service.check_model(request.model)
    if request.previous_response_id is not None:
        message = "responses are not stored here: send the conversation as input instead"
        raise ApiError(400, message, param="previous_response_id")
    if request.tools:
        raise ApiError(400, "tools are served by /v1/chat/completions", param="tools")
    form = requested_form(_format(request), request.structured_outputs, "text.format")
    check_form(form, request, request.chat_template_kwargs)
    guide = form.guide if form else None
    prompt = await service.render(_messages(request), None, request.chat_template_kwargs)
    prompt, opened = thinking_state(prompt, guide)
    parser = OutputParser(reasoning_splitter(service, opened, guide), None)
    generation = await generate_chat(
        service, request, prompt, request.max_output_tokens, guided=guide, spans=parser.spans
    )
    answer = _Answer(service, request, generation, parser)
    if request.stream:
        return EventStream(generation, answer.events(), done=False)
    async for _ in answer.events():
        pass
    if answer.error:
        raise answer.error
    return answer.response


def _format(request: ResponsesRequest) -> TextFormat | None:
    form = request.text.format if request.text else None
    if form is None:
        return None
    schema = JsonSchema(name=form.name or "output", schema=form.schema_)
    return TextFormat(type=form.type, json_schema=schema if form.type == "json_schema" else None)


def _messages(request: ResponsesRequest) -> list[Message]:
    """The conversation, instructions first."""
    if isinstance(request.input, str):
        messages = [Message(role="user", content=request.input)]
    else:
        spoken = [item for item in request.input if isinstance(item, InputMessage)]
        messages = [Message(role=item.role, content=item.content) for item in spoken]
    if request.instructions:
        messages.insert(0, Message(role="system", content=request.instructions))
    if not messages:
        raise ApiError(400, "input has no message", param="input")
    return messages


class _Answer:
    """A response that grows event by event."""

    def __init__(self, service: Service, request: ResponsesRequest, generation: Generation, parser: OutputParser):
        self._generation = generation
        self._parser = parser
        self._numbers = itertools.count()
        self._open: dict[str, Any] | None = None  # the output item that is being written
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
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}} if request.text is None else request.text.model_dump(by_alias=True),
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "usage": None,
        }

    async def events(self) -> AsyncIterator[Event]:
        """The events of the stream; when they are over, `response` is complete."""
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
                reason = delta.finish_reason
        except (RequestFailed, EngineStopped) as error:
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
            self.response |= {"status": "failed", "error": {"code": "server_error", "message": str(self.error)}}
        elif reason == "length":
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            self.response["status"] = "completed"

    def _event(self, kind: str, **values: Any) -> Event:
        return {"type": kind, "sequence_number": next(self._numbers), **values}

    def _part_event(self, kind: str, **values: Any) -> Event:
        """An event about the one part of the open item."""
        assert self._open
        place = {"item_id": self._open["id"], "output_index": len(self.response["output"]) - 1, "content_index": 0}
        return self._event(kind, **place, **values)

    def _write(self, kind: str, text: str) -> list[Event]:
        """Events of text for the open item, or for a new one if that is of another kind."""
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
        self._open = item
        self.response["output"].append(item)
        index = len(self.response["output"]) - 1
        added = self._event("response.output_item.added", output_index=index, item={**item, "content": []})
        item["content"] = [part]
        return [added, self._part_event("response.content_part.added", part=dict(part))]

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        item, part = self._open, self._open["content"][0]
        item["status"] = status
        if item["type"] == "reasoning":
            done = self._part_event("response.reasoning_text.done", text=part["text"])
        else:
            done = self._part_event("response.output_text.done", text=part["text"], logprobs=[])
        part_done = self._part_event("response.content_part.done", part=dict(part))
        index = len(self.response["output"]) - 1
        item_done = self._event("response.output_item.done", output_index=index, item=dict(item))
        self._open = None
        return [done, part_done, item_done]
