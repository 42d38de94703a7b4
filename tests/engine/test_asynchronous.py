"""The engine behind an event loop: streams, leaving early, a bounded queue, faults, refusing and stopping."""

import asyncio
import ctypes
import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from leanseek import Transformer, native
from leanseek.engine import (
    AsyncEngine,
    Delta,
    Engine,
    EngineError,
    EngineStopped,
    QueueFull,
    Request,
    RequestFailed,
    SamplingParams,
    Stream,
)
from leanseek.engine.runner import Runner
from leanseek.engine.sampler import Rows

LONG = SamplingParams(temperature=0, max_tokens=300)
SHORT = SamplingParams(temperature=0, max_tokens=5)


@asynccontextmanager
async def started(engine: Engine, **options: Any) -> AsyncIterator[AsyncEngine]:
    running = AsyncEngine(engine, **options)
    running.start()
    try:
        yield running
    finally:
        running.stop()
    assert not running.alive
    engine.check_invariants()
    assert not engine.has_work()


class Gate:
    """Lets an engine take `steps` steps and `open()` lets it take all, so that a test knows where it stands.

    What waits for a step that is held up would wait for ever: after a minute the engine breaks.
    """

    def __init__(self, engine: Engine, steps: int):
        self._left, self._step = threading.Semaphore(steps), engine.step
        self.reached = threading.Event()  # a step is held up
        engine.step = self._wait  # type: ignore[method-assign]

    def open(self) -> None:
        self._left.release(10**6)

    def _wait(self) -> list[Delta]:
        if not self._left.acquire(blocking=False):
            self.reached.set()
            assert self._left.acquire(timeout=60), "nobody lets the step go on"
        return self._step()

    async def until_reached(self) -> None:
        while not self.reached.is_set():
            await asyncio.sleep(0.001)


async def read(stream: Stream) -> list[Delta]:
    return [delta async for delta in stream]


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_streams_side_by_side_give_what_the_engine_gives(
    model: Transformer, make_engine: Callable, serve: Callable, prompts: list[list[int]]
) -> None:
    expected = serve(make_engine(model), prompts, SHORT)

    async def main() -> None:
        async with started(make_engine(model)) as engine:
            streams = [engine.submit(prompt, SHORT) for prompt in prompts]
            answers = await asyncio.gather(*map(read, streams))
            assert [tokens_of(deltas) for deltas in answers] == expected
            last = answers[0][-1]
            assert last.finish_reason == "length"
            assert last.usage is not None
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompts[0]), 5)
            assert last.timing is not None
            assert last.timing.arrived <= last.timing.scheduled <= last.timing.first_token <= last.timing.finished
            assert engine.stats().generated_tokens == 25

    asyncio.run(main())


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_client_that_leaves_frees_its_pages(model: Transformer, make_engine: Callable, how: str) -> None:
    async def main() -> None:
        inner = make_engine(model, prefix_cache=False)
        gate = Gate(inner, 4)
        async with started(inner) as engine:
            stream = engine.submit(list(range(2, 60)), LONG)
            await anext(stream)
            await gate.until_reached()
            assert engine.stats().pages_used > 0
            if how == "close":
                await stream.aclose()
                await stream.aclose()
                assert [delta async for delta in stream] == []
            else:
                reader = asyncio.create_task(read(stream))
                await asyncio.sleep(0.01)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            steps = engine.stats().steps
            gate.open()
            while engine.stats().pages_used:
                await asyncio.sleep(0.001)
            assert engine.stats().steps <= steps + 2  # the one under way, and the next
            assert engine.stats().finished == {"abort": 1}

    asyncio.run(asyncio.wait_for(main(), 120))


def test_the_queue_is_bounded(model: Transformer, make_engine: Callable) -> None:
    async def main() -> None:
        inner = make_engine(model, max_batch=2)
        gate = Gate(inner, 0)
        async with started(inner, max_queue=3) as engine:
            streams = [engine.submit([2, 3], LONG) for _ in range(5)]
            with pytest.raises(QueueFull) as caught:
                engine.submit([2, 3], SHORT)
            assert caught.value.retry_after >= 1
            for stream in streams:
                stream.close()
            gate.open()
            while engine.stats().finished.get("abort", 0) < 5:
                await asyncio.sleep(0.001)
            assert len(tokens_of(await read(engine.submit([2, 3], SHORT)))) == 5

    asyncio.run(asyncio.wait_for(main(), 120))


def test_bad_requests_are_refused_when_submitted(model: Transformer, make_engine: Callable) -> None:
    async def main() -> None:
        async with started(make_engine(model)) as engine:
            with pytest.raises(EngineError):
                engine.submit([], SHORT)
            with pytest.raises(EngineError):
                engine.submit([2] * 1000, SHORT)
            stream = engine.submit([2], LONG, request_id="x")
            with pytest.raises(EngineError, match="already"):
                engine.submit([2], LONG, request_id="x")
            stream.close()

    asyncio.run(main())


def test_a_fault_reaches_its_own_stream_only(
    model: Transformer, make_engine: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Rows.add

    def bad_add(self: Rows, sequence) -> None:  # type: ignore[no-untyped-def]
        if sequence.request.request_id == "bad" and sequence.output_length == 2:
            raise ZeroDivisionError("bad luck")
        add(self, sequence)

    monkeypatch.setattr(Rows, "add", bad_add)

    async def main() -> None:
        async with started(make_engine(model)) as engine:
            good, bad = engine.submit([2, 3], SHORT), engine.submit([2, 3], SHORT, request_id="bad")
            answers = await asyncio.gather(read(good), read(bad), return_exceptions=True)
            assert isinstance(answers[0], list)
            assert isinstance(answers[1], RequestFailed)
            assert "bad luck" in str(answers[1])
            assert len(tokens_of(await read(engine.submit([2, 3], SHORT)))) == 5

    asyncio.run(asyncio.wait_for(main(), 120))


def test_an_engine_that_breaks_tells_everyone(
    model: Transformer, make_engine: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        inner = make_engine(model)
        monkeypatch.setattr(inner._scheduler, "schedule", lambda budget: 1 / 0)
        engine = AsyncEngine(inner)
        engine.start()
        with pytest.raises(RequestFailed):
            await read(engine.submit([2, 3], SHORT))
        while engine.alive:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineStopped):
            engine.submit([2, 3], SHORT)

    asyncio.run(asyncio.wait_for(main(), 120))


def test_what_runs_is_finished_once_no_more_is_taken(model: Transformer, make_engine: Callable) -> None:
    async def main() -> None:
        inner = make_engine(model)
        gate = Gate(inner, 2)
        async with started(inner) as engine:
            reader = asyncio.create_task(read(engine.submit([2, 3], SHORT)))
            await gate.until_reached()
            engine.refuse()
            with pytest.raises(EngineStopped):
                engine.submit([2, 3], SHORT)
            gate.open()
            assert len(tokens_of(await reader)) == 5

    asyncio.run(asyncio.wait_for(main(), 120))


def test_stop_ends_open_streams(model: Transformer, make_engine: Callable) -> None:
    async def main() -> None:
        inner = make_engine(model, max_batch=1)
        gate = Gate(inner, 2)
        async with started(inner) as engine:
            readers = [asyncio.create_task(read(engine.submit([2, 3], LONG))) for _ in range(3)]
            await gate.until_reached()
            engine.stop(timeout=0)
            gate.open()
            for deltas in await asyncio.gather(*readers):
                assert deltas[-1].finish_reason == "abort"

    asyncio.run(asyncio.wait_for(main(), 120))


def test_the_event_loop_never_waits_for_a_step(model: Transformer, make_engine: Callable) -> None:
    """All that a server calls there returns while a step is under way."""

    async def main() -> None:
        inner = make_engine(model, max_batch=1)
        gate = Gate(inner, 1)
        async with started(inner, max_queue=1) as engine:
            first = engine.submit([2, 3], SHORT)
            await gate.until_reached()
            second = engine.submit([2, 4], SHORT)
            with pytest.raises(QueueFull):
                engine.submit([2, 5], SHORT)
            second.close()
            engine.check([2, 6], SHORT)
            assert engine.stats().steps <= 1 and engine.accepting and engine.alive
            engine.refuse()
            gate.open()
            assert len(tokens_of(await read(first))) == 5

    asyncio.run(asyncio.wait_for(main(), 120))


def test_many_clients_of_which_a_third_leaves(model: Transformer, make_engine: Callable) -> None:
    """No page leaks and no request goes unanswered."""

    async def client(engine: AsyncEngine, i: int, gate: asyncio.Semaphore) -> str:
        draw = random.Random(i)
        params = SamplingParams(max_tokens=draw.randint(1, 20), seed=i, n=draw.choice([1, 1, 2]))
        prompt = [2 + draw.randrange(8) for _ in range(draw.randint(1, 60))]
        async with gate:
            stream = engine.submit(prompt, params, priority=draw.randrange(3))
            ended = 0
            async for delta in stream:
                ended += delta.finish_reason is not None
                if i % 3 == 0 and draw.random() < 0.3:
                    stream.close()
                    return "left"
            assert ended == params.n
            return "served"

    async def main() -> None:
        inner = make_engine(model, max_batch=8, page_size=4)
        async with started(inner) as engine:
            gate = asyncio.Semaphore(24)
            answers = await asyncio.gather(*(client(engine, i, gate) for i in range(90)))
            assert answers.count("served") >= 60 and answers.count("left") >= 10
            while engine._streams:
                await asyncio.sleep(0.001)
            assert engine.stats().pages_used == 0
            assert engine.stats().requests == 90

    asyncio.run(asyncio.wait_for(main(), 300))


def test_synchronous_requests_do_not_need_a_loop(model: Transformer, make_engine: Callable) -> None:
    """The engine itself has no thread and no loop."""
    engine = make_engine(model)
    engine.add(Request("r", [2, 3], SHORT))
    assert len(tokens_of([delta for _ in range(6) for delta in engine.step()])) == 5


@pytest.mark.skipif(not native.usable_variants(), reason=f"no kernels here: {native.status().detail}")
def test_the_engine_s_thread_runs_on_as_many_threads_as_were_set(
    model: Transformer, make_engine: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP keeps the number for each thread apart, and the native kernels go by OpenMP's."""
    wanted = (os.cpu_count() or 1) + 1  # no thread's number unless somebody sets it
    torch.set_num_threads(wanted)
    found = []
    run = Runner.run

    def spy(*arguments: Any) -> Any:
        result = run(*arguments)
        found.append(ctypes.CDLL(None).omp_get_max_threads())
        return result

    monkeypatch.setattr(Runner, "run", spy)

    async def main() -> None:
        async with started(make_engine(model)) as engine:
            await read(engine.submit([2, 3, 4], SHORT))

    asyncio.run(main())
    assert set(found) == {wanted}
