"""A server under load: many requests of mixed length, a third of whose clients leave early."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from leanseek.bench.machine import cpu_name
from leanseek.bench.models import cache_root, random_model
from leanseek.bench.serve import Server
from leanseek.errors import RunError

AT_ONCE = 64
PROMPTS, ANSWERS = (1, 400), (1, 160)  # tokens
CACHE_GIB = 0.005  # about 6,700 tokens of the demo network: 64 requests want more
TIMEOUT = 300.0  # seconds after which a request counts as unanswered
PROBE_EVERY, SAMPLE_EVERY = 0.05, 0.25  # seconds between two looks at /health, at memory
IDLE_WITHIN = 10.0


def bench_load(model: str | Path, requests: int) -> dict[str, Any]:
    """Put a server of its own under `requests` requests, AT_ONCE at a time, and tell how it fared.

    Raises:
        InputError: there is no such preset or model.
        RunError: the server did not start.
    """
    folder = model if isinstance(model, Path) else random_model(model, "fp8", cache_root())
    server = Server(folder, "--cache-gib", str(CACHE_GIB))
    try:
        watch = _Memory(server.process.pid)
        with subprocess.Popen(
            [sys.executable, "-m", "leanseek.bench.load", server.host, str(server.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
        ) as probe:  # fmt: skip
            start = time.perf_counter()
            ends = asyncio.run(_everyone(server, requests))
            seconds = time.perf_counter() - start
            latencies = sorted(json.loads(probe.communicate("")[0]))
        samples = watch.stop()
        load, metrics = _settled(server)
    finally:
        server.close()
    return {
        "benchmark": "serve-load", "model": str(model), "cpu": cpu_name(),
        "requests": requests, "at_once": AT_ONCE, "seconds": seconds, "ends": dict(ends),
        "unanswered": requests - ends["answered"] - ends["left"],
        "after": load, "choices": metrics["choices"], "preemptions": metrics["preemptions"],
        "health": _quantiles(latencies), "memory": _memory(samples),
        "exit_code": server.process.returncode,
    }  # fmt: skip


# ---- clients ----


async def _everyone(server: Server, requests: int) -> Counter[str]:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> str:
        async with room:
            try:
                return await asyncio.wait_for(_client(server, number), TIMEOUT)
            except (OSError, asyncio.IncompleteReadError) as error:
                return type(error).__name__
            except TimeoutError:
                return "no end in time"

    return Counter(await asyncio.gather(*map(one, range(requests))))


async def _client(server: Server, number: int) -> str:
    """One request, streamed or whole; every third client leaves: at once, or after a few pieces of the answer."""
    generator = random.Random(number)
    leaves, streams = number % 3 == 0, generator.random() < 0.7
    body = {
        "prompt": [generator.randrange(2, 4096) for _ in range(generator.randint(*PROMPTS))],
        "max_tokens": generator.randint(*ANSWERS), "ignore_eos": True, "stream": streams, "seed": number,
    }  # fmt: skip
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: load\r\nContent-Length: {len(content)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + content)
        await writer.drain()
        if leaves and not streams:
            await asyncio.sleep(generator.random())
            return "left"
        status = (await reader.readline()).split()[1]
        if status != b"200":
            return f"status {status.decode()}"
        if leaves:
            for _ in range(generator.randint(1, 20)):
                await reader.readline()
            return "left"
        whole = await reader.read()
        return "answered" if b"data: [DONE]" in whole or b'"finish_reason": "length"' in whole else "cut"
    finally:
        writer.close()


# ---- what is watched ----


class _Memory:
    """A thread that notes the resident bytes of a process."""

    def __init__(self, pid: int):
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._samples: list[int] = []
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_EVERY):
            self._samples.append(self._process.memory_info().rss)

    def stop(self) -> list[int]:
        self._done.set()
        self._thread.join()
        return self._samples


def _memory(samples: list[int]) -> dict[str, Any]:
    """Growth over the second half, as a least-squares line: by then every buffer has been made once."""
    if not samples:  # it was over before the first
        return {}
    half = samples[len(samples) // 2 :]
    middle, mean = (len(half) - 1) / 2, sum(half) / len(half)
    spread = sum((i - middle) ** 2 for i in range(len(half))) or 1.0
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(half)) / spread
    return {
        "peak_bytes": max(samples),
        "mean_bytes": mean,
        "growth_bytes_in_second_half": slope * (len(half) - 1),
        "bytes_by_tenth": [samples[i * (len(samples) - 1) // 10] for i in range(11)],
    }


def _quantiles(latencies: list[float]) -> dict[str, float]:
    if not latencies:
        return {"probes": 0}
    at = [latencies[min(len(latencies) - 1, int(q * len(latencies)))] for q in (0.5, 0.99)]
    return {"probes": len(latencies), "p50_seconds": at[0], "p99_seconds": at[1], "worst_seconds": latencies[-1]}


def _settled(server: Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """/health and /metrics once nothing runs any more, or when that has taken too long."""
    deadline = time.monotonic() + IDLE_WITHIN
    while True:
        load = json.loads(server.get("/health"))
        if not (load["running"] or load["waiting"]) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    choices: dict[str, int] = {}
    preemptions = 0
    for line in server.get("/metrics").splitlines():
        if line.startswith("leanseek:request_success_total{"):
            choices[line.split('finished_reason="')[1].split('"')[0]] = int(float(line.rsplit(" ", 1)[1]))
        elif line.startswith("leanseek:num_preemptions_total{"):
            preemptions = int(float(line.rsplit(" ", 1)[1]))
    return load, {"choices": choices, "preemptions": preemptions}


def _probe(host: str, port: str) -> None:
    """In a process of its own, so that the clients' work is not taken for the server's: seconds of each /health."""
    import http.client
    import select

    latencies = []
    while not select.select([sys.stdin], [], [], PROBE_EVERY)[0]:
        start = time.perf_counter()
        connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT)
        connection.request("GET", "/health")
        if connection.getresponse().status != 200:
            raise RunError("/health is not well")
        latencies.append(time.perf_counter() - start)
        connection.close()
    print(json.dumps(latencies))


if __name__ == "__main__":
    _probe(*sys.argv[1:])
