"""The engine in a thread of its own, for a server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from leanseek.config import ModelConfig
from leanseek.engine.engine import Engine
from leanseek.engine.guidance import Matcher
from leanseek.engine.llm import load_engine
from leanseek.engine.outputs import Delta, EngineStats
from leanseek.engine.params import EngineError, SamplingParams
from leanseek.engine.sequence import Request
from leanseek.engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """Too many requests are waiting; try again after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests are waiting; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class EngineStopped(RuntimeError):
    """The engine takes no more requests: it is stopping, has stopped, or has crashed."""


class RequestFailed(RuntimeError):
    """An internal error ended this request; others continue."""


class Stream:
    """The deltas of one request. Closing it, or cancelling the task that awaits it, ends the request within a step."""

    def __init__(self, engine: AsyncEngine, request_id: str, choices: int, loop: asyncio.AbstractEventLoop):
        self.request_id = request_id
        self.loop = loop
        self._engine = engine
        self._open = choices  # choices that have not finished
        self._ready: deque[Delta] = deque()
        self._arrival = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        """The next delta; the stream ends when all choices have ended.

        Raises:
            EngineError: the request turned out to be impossible to serve.
            RequestFailed: an internal error ended the request.
        """
        try:
            while not self._ready:
                if not self._open:
                    raise StopAsyncIteration
                self._arrival.clear()
                await self._arrival.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        delta = self._ready.popleft()
        self._open -= delta.finish_reason is not None
        if delta.finish_reason == "error":
            self.close()
            raise EngineError(delta.error) if delta.refused else RequestFailed(delta.error)
        return delta

    def close(self) -> None:
        """End the request if it has not ended; may be called repeatedly."""
        if self._open:
            self._open = 0
            self._ready.clear()
            self._engine._abort(self.request_id)

    async def aclose(self) -> None:
        self.close()

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        if self._open:
            self._ready.extend(deltas)
            self._arrival.set()


class AsyncEngine:
    """An `Engine` that steps in its own thread.

    max_queue: requests that may wait, in addition to those running.
    """

    def __init__(self, engine: Engine, *, max_queue: int = 256):
        self._engine = engine
        self.capacity = max_queue + engine.max_batch  # requests that run or wait
        self._ids = itertools.count(1)
        self._lock = threading.Condition()
        self._commands: list[Request | str] = []  # a request to add, or the id of one to abort
        self._streams: dict[str, Stream] = {}
        self._accepting = True
        self._stopping = False
        self._snapshot = engine.stats()
        self._durations = 1.0  # running mean of a request's seconds
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @classmethod
    def load(cls, path: str | Path, *, max_queue: int = 256, **options: Any) -> AsyncEngine:
        """Load a Hugging Face folder or a run; options as in `load_engine`.

        Raises:
            InputError: the folder or an option is invalid.
        """
        return cls(load_engine(path, **options), max_queue=max_queue)

    # ---- for any thread ----

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def config(self) -> ModelConfig:
        return self._engine.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of SamplingParams from generation_config.json."""
        return self._engine.defaults

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises EngineError if the request can never be served. Does not check its guide."""
        self._engine.check(prompt_token_ids, params)

    def matcher(self, params: SamplingParams) -> Matcher | None:
        """The compiled guide of a request, if it has one, for `submit`. Takes up to seconds: call it in a thread.

        Raises:
            EngineError: the guide is invalid, or takes too much time or memory to compile.
            Crowded: too many slow guides are being compiled.
        """
        return self._engine.matcher(params)

    def stats(self) -> EngineStats:
        """Statistics as of the last step; does not block."""
        return self._snapshot

    @property
    def accepting(self) -> bool:
        """Whether the engine takes new requests."""
        return self._accepting and self.alive

    def refuse(self) -> None:
        """Take no more requests; those already submitted continue."""
        self._accepting = False

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after its current step; open streams end with finish_reason "abort".

        timeout: seconds to wait for that step; None waits as long as it takes.
        """
        with self._lock:
            self._accepting, self._stopping = False, True
            self._lock.notify()
        if self.alive:
            self._thread.join(timeout)

    # ---- for the event loop ----

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        request_id: str | None = None,
        matcher: Matcher | None = None,
    ) -> Stream:
        """Queue a request. Call it in the event loop that reads the stream.

        matcher: the compiled guide of a guided request; without it, compiling the guide here blocks the loop.

        Raises:
            EngineError: the request can never be served.
            QueueFull: too many requests are waiting.
            EngineStopped: the engine takes no more requests.
        """
        self.check(prompt_token_ids, params)
        request_id = request_id or f"request-{next(self._ids)}"
        matcher = matcher or self.matcher(params)
        request = Request(request_id, list(prompt_token_ids), params, priority, matcher=matcher)
        stream = Stream(self, request_id, params.n, asyncio.get_running_loop())
        with self._lock:
            if not self._accepting or not self.alive:
                raise EngineStopped("the engine takes no more requests")
            if request_id in self._streams:
                raise EngineError(f"request {request_id!r} is already running")
            waiting = len(self._streams)
            if waiting >= self.capacity:
                raise QueueFull(waiting, min(60.0, max(1.0, self._durations)))
            self._streams[request_id] = stream
            self._commands.append(request)
            self._lock.notify()
        return stream

    def _abort(self, request_id: str) -> None:
        with self._lock:
            self._commands.append(request_id)
            self._lock.notify()

    # ---- the engine's thread ----

    def _loop(self) -> None:
        try:
            while self._wait():
                self._execute()
                self._publish(self._engine.step())
            self._execute()
            for request_id in list(self._streams):
                self._engine.abort(request_id)
            self._publish(self._engine.step())
        except Exception:
            log.exception("the engine broke")
            with self._lock:
                self._accepting = False  # before telling the streams, so that no new one misses the news
                streams = list(self._streams)
            self._publish([Delta(each, finish_reason="error", error="the engine broke") for each in streams])
        finally:
            self._accepting = False

    def _wait(self) -> bool:
        """Sleep until there is something to do; False if that is to stop."""
        with self._lock:
            while not (self._commands or self._stopping or self._engine.has_work()):
                self._lock.wait()
            return not self._stopping

    def _execute(self) -> None:
        """Add and abort the requests queued since the last step."""
        with self._lock:
            commands, self._commands = self._commands, []
        for command in commands:
            if isinstance(command, str):
                self._engine.abort(command)
                continue
            try:
                self._engine.add(command)
            except Exception as error:
                refused = isinstance(error, EngineError)
                self._publish([Delta(command.request_id, finish_reason="error", error=str(error), refused=refused)])

    def _publish(self, deltas: Sequence[Delta]) -> None:
        """Deliver deltas to their streams, each in its own event loop."""
        self._snapshot = self._engine.stats()
        parcels: dict[Stream, list[Delta]] = defaultdict(list)
        for delta in deltas:
            if (stream := self._streams.get(delta.request_id)) is not None:
                parcels[stream].append(delta)
            if delta.timing is not None:
                self._durations += 0.1 * (delta.timing.finished - delta.timing.arrived - self._durations)
        for stream, parcel in parcels.items():
            if not self._engine.serves(stream.request_id):
                with self._lock:
                    del self._streams[stream.request_id]
            with contextlib.suppress(RuntimeError):  # its loop is closed, so nobody reads the stream
                stream.loop.call_soon_threadsafe(stream._deliver, parcel)
