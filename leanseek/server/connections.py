"""Connections: time limits, a cap on their number, and a bounded shutdown.

uvicorn (with h11) speaks HTTP. This module adds what uvicorn leaves to a proxy: timeouts for clients that stop sending
or reading, a cap on connections that keeps descriptors free, and a deadline for shutting down.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from leanseek.server.errors import RETRY_AFTER_STOP_S, ApiError
from leanseek.server.service import Service

logger = logging.getLogger("leanseek.server")

ACCEPTED_AT_ONCE = 16  # connections accepted between two checks of their number
RESERVED = 64 + ACCEPTED_AT_ONCE  # descriptors for files and for the template and guide processes
TAKEN_BYTES = 4096  # of a pending answer; a client that reads less than this in `taking_s` has stopped reading
TELLING_S = 2.0  # the most shutdown time kept to send running requests their error
NOTICE_S = 60.0


def most_connections() -> int:
    """How many connections leave enough descriptors for everything else."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        limit = 2**16
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:  # no such folder outside Linux
        used = 64
    return max(8, limit - used - RESERVED)


@dataclass(frozen=True)
class Limits:
    """Limits on connections; times in seconds."""

    head_s: float = 20.0  # from the first byte of a request (or from connecting) to the end of its head
    body_s: float = 120.0  # from there to the end of its body
    taking_s: float = 60.0  # how long a pending answer may go unread
    keep_alive_s: float = 75.0  # between two requests: longer than client pools and common proxies keep a connection
    shutdown_s: float = 30.0  # from the signal to the end of the process
    connections: int = field(default_factory=most_connections)


class _Notice:
    """Logs a warning at most once every NOTICE_S seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, message: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + NOTICE_S
            logger.warning(message)


class Connection(H11Protocol):
    """One connection; the server calls `check` twice a second."""

    def __init__(self, *arguments: Any, limits: Limits, notice: _Notice, **named: Any):
        super().__init__(*arguments, **named)
        self._limits = limits
        self._notice = notice
        self._since = self._taken = self.loop.time()
        self._awaited: tuple[str | None, object] = ("head", None)  # the missing part of a request, and the request
        self._held = 0  # bytes of the answer unsent when the client last read some

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self._limits.connections:
            self._make_room()

    def _make_room(self) -> None:
        """Close the connection that has waited longest for a request; if all have one, refuse this connection."""
        self._notice(f"{self._limits.connections} connections are open, which is the limit; closing idle ones")
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        waiting = [other for other in others if other._part() or other.conn.our_state is h11.IDLE]
        if not waiting:
            return self._refuse(503, "too many connections", RETRY_AFTER_STOP_S)
        oldest = min(waiting, key=lambda other: other._since)
        self.connections.discard(oldest)
        oldest.transport.abort()

    def _part(self) -> str | None:
        """Which part of a request has yet to arrive."""
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            return "head"
        return "body" if self.conn.their_state is h11.SEND_BODY else None

    @property
    def busy(self) -> bool:
        """Whether a complete request waits for its answer, or the client has not read its answer yet."""
        answering = self.cycle is not None and not self.cycle.response_complete and not self._part()
        return answering or self.transport.get_write_buffer_size() > 0

    def check(self, now: float) -> None:
        """End the connection if its client has exceeded a time limit."""
        awaited = (self._part(), self.cycle)
        if awaited != self._awaited:
            self._awaited, self._since = awaited, now
        limit = {"head": self._limits.head_s, "body": self._limits.body_s}.get(awaited[0] or "", float("inf"))
        if now - self._since > limit:
            self.give_up(408, f"the request's {awaited[0]} did not arrive within {limit:g} s")
        held = self.transport.get_write_buffer_size()
        if not held or held <= self._held - TAKEN_BYTES:
            self._held, self._taken = held, now
        self._held = max(self._held, held)
        if held and now - self._taken > self._limits.taking_s:
            self.transport.abort()

    def give_up(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        """End a request that has not arrived completely."""
        if self.cycle is None and not self.conn.trailing_data[0]:  # no request has begun
            return self.transport.close()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            return self.transport.abort()
        self._refuse(status, message, retry_after_s)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and {b"content-length", b"transfer-encoding"} <= {name for name, _ in self.headers}:
            self.cycle.keep_alive = False  # its end is ambiguous, so no request may follow

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to invalid HTTP, in our format."""
        self._refuse(400, "this is not a valid HTTP request")

    def _refuse(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        """Answer without the application, unless an answer has begun, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # or the application would wait for the rest, or answer too
            self.cycle.message_event.set()
        error = ApiError(status, message, retry_after_s=retry_after_s)
        body = json.dumps(error.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        response = h11.Response(
            status_code=status, headers=list((headers | error.headers).items()), reason=STATUS_PHRASES[status]
        )
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def shutdown(self) -> None:
        """The server stops: end incomplete requests; close the other connections after their answers."""
        if self._part() == "body":
            self.give_up(503, "the server is stopping", RETRY_AFTER_STOP_S)
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False


class Server(uvicorn.Server):
    """Runs until a signal arrives, and then for at most `limits.shutdown_s`.

    The first signal drains; the second has its default action and ends the process. The server keeps listening while it
    drains, and answers new requests with 503.
    """

    def __init__(self, app: ASGIApp, service: Service, limits: Limits, greeting: str = ""):
        self._service = service
        self._limits = limits
        self._greeting = greeting
        self._notice = _Notice()
        config = uvicorn.Config(
            app,
            http=partial(Connection, limits=limits, notice=self._notice),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,  # keep the logging of the process
            log_level="error",  # its warnings would add a line for each bad request
            access_log=False,
            server_header=False,
            backlog=ACCEPTED_AT_ONCE,
            timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._complain)
        await super().startup(sockets)
        for listener in sockets or ():  # for asyncio, the backlog is also how many it accepts at once
            listener.listen(1024)
        if self._greeting:
            print(self._greeting, file=sys.stderr, flush=True)

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error outside requests. Out of descriptors, asyncio would log a traceback for every failed accept."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            self._notice(f"cannot accept connections now ({error.strerror})")
        else:
            loop.default_exception_handler(context)

    async def on_tick(self, counter: int) -> bool:
        if counter % 5 == 0:
            self._check()
        return await super().on_tick(counter)

    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    def _check(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in self._connections():
            connection.check(now)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish running requests; when the time is up, end the rest with an error."""
        end = asyncio.get_running_loop().time() + self._limits.shutdown_s
        self._service.engine.refuse()
        for connection in self._connections():
            connection.shutdown()
        if not await self._quiet(end - min(TELLING_S, self._limits.shutdown_s / 4)):
            self._service.engine.stop(timeout=0)  # streams and whole answers end with an error
            self._service.close()
            await self._quiet(end)
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        for connection in self._connections():
            connection.transport.abort()
        if self.server_state.tasks:  # they notice that their clients are gone
            await asyncio.wait(self.server_state.tasks, timeout=0.5)

    async def _quiet(self, end: float) -> bool:
        """Wait until no connection is busy; False if that takes longer than until `end`."""
        while any(connection.busy for connection in self._connections()):
            if asyncio.get_running_loop().time() > end:
                return False
            self._check()
            await asyncio.sleep(0.02)
        return True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
            yield
            return

        def drain(number: int, frame: object) -> None:
            for each in handled:
                signal.signal(each, signal.SIG_DFL)
            self.should_exit = True

        handled = (signal.SIGTERM, signal.SIGINT)
        previous = {each: signal.signal(each, drain) for each in handled}
        try:
            yield
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)
