"""Long-running answers, which end when their client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from leanseek.server.errors import as_api_error
from leanseek.server.service import Generation

T = TypeVar("T")


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects first. Call it after reading the body.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect()
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Server-sent events as an ASGI response.

    events: what to send, in order; an event with a "type" (as in /v1/responses) is named after it
    done: whether to send "data: [DONE]" at the end
    """

    def __init__(self, generation: Generation, events: AsyncIterator[dict[str, Any]], done: bool = True):
        self._generation = generation
        self._events = events
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_left(receive, self._send(send))
        finally:
            self._generation.close()

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        headers.append((b"x-accel-buffering", b"no"))  # or proxies such as nginx buffer the events
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": _sse(event), "more_body": True})
        except Exception as error:  # too late for a status, so the error becomes an event
            await send({"type": "http.response.body", "body": _sse(as_api_error(error).body), "more_body": True})
        end = b"data: [DONE]\n\n" if self._done else b""
        await send({"type": "http.response.body", "body": end, "more_body": False})


# Clients that read events with Python's `splitlines` or older JavaScript parsers take these for line ends.
_LINE_ENDS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}


def _sse(event: Mapping[str, Any]) -> bytes:
    name = f"event: {event['type']}\n" if "type" in event else ""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"{name}data: {data}\n\n".encode()
