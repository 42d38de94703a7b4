"""The engine behind an event loop: streams, leaving early, a bounded queue, faults, refusing and stopping."""

import asyncio
import ctypes
import os
import random
import time
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
        async with started(inner) as engine:
            stream = engine.submit(list(range(2, 60)), LONG)
            await anext(stream)
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
            while engine.stats().pages_used:
                await asyncio.sleep(0.001)
            assert engine.stats().steps <= steps + 2  # the one under way, and the next
            assert engine.stats().finished == {"abort": 1}

    asyncio.run(asyncio.wait_for(main(), 20))


def test_the_queue_is_bounded(model: Transformer, make_engine: Callable) -> None:
    async def main() -> None:
        async with started(make_engine(model, max_batch=2), max_queue=3) as engine:
            streams = [engine.submit([2, 3], LONG) for _ in range(5)]
            with pytest.raises(QueueFull) as caught:
                engine.submit([2, 3], SHORT)
            assert caught.value.retry_after >= 1
            for stream in streams:
                stream.close()
            while engine.stats().finished.get("abort", 0) < 5:
                await asyncio.sleep(0.001)
            assert len(tokens_of(await read(engine.submit([2, 3], SHORT)))) == 5

    asyncio.run(asyncio.wait_for(main(), 20))


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

    asyncio.run(asyncio.wait_for(main(), 20))


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

    asyncio.run(asyncio.wait_for(main(), 20))


def test_what_runs_is_finished_once_no_more_is_taken(model: Transformer, make_engine: Callable) -> None:
    async def main() -> None:
        async with started(make_engine(model)) as engine:
            reader = asyncio.create_task(read(engine.submit([2, 3], LONG)))
            await asyncio.sleep(0.01)
            engine.refuse()
            with pytest.raises(EngineStopped):
                engine.submit([2, 3], SHORT)
            assert len(tokens_of(await reader)) == 300

    asyncio.run(asyncio.wait_for(main(), 20))


def test_stop_ends_open_streams(model: Transformer, make_engine: Callable) -> None:
    async def main() -> None:
        async with started(make_engine(model, max_batch=1)) as engine:
            readers = [asyncio.create_task(read(engine.submit([2, 3], LONG))) for _ in range(3)]
            await asyncio.sleep(0.02)
            engine.stop()
            for deltas in await asyncio.gather(*readers):
                assert deltas[-1].finish_reason == "abort"

    asyncio.run(asyncio.wait_for(main(), 20))


def test_many_clients_of_which_a_third_leaves(model: Transformer, make_engine: Callable) -> None:
    """No page leaks, no request goes unanswered, and the event loop is never held up for long."""
    longest = 0.0

    async def heartbeat() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - before)

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
            beat = asyncio.create_task(heartbeat())
            gate = asyncio.Semaphore(24)
            answers = await asyncio.gather(*(client(engine, i, gate) for i in range(150)))
            beat.cancel()
            assert answers.count("served") >= 100
            while engine._streams:
                await asyncio.sleep(0.001)
            assert engine.stats().pages_used == 0
            assert engine.stats().requests == 150

    asyncio.run(asyncio.wait_for(main(), 60))
    assert longest < 0.5


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
