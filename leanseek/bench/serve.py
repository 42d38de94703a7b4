"""Serving speed: streams side by side, time to the first token, start-up, the engine's own overhead; beside vLLM's.

As a program it is the worker: `python -m leanseek.bench.serve FOLDER SPECULATE [TEXT]`, which serves as many streams as
it is told, then reports (bench/workers.py).
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leanseek.bench.machine import machine
from leanseek.bench.models import cache_root, random_model
from leanseek.bench.workers import Worker, peer_command, say, serve
from leanseek.checkpoint import read_config, resolve
from leanseek.engine import Engine, Request, SamplingParams, load_engine
from leanseek.errors import InputError, RunError

PROMPT, NEW = 128, 128  # tokens of a stream
SHORT, LONG = 32, 4096  # prompts of the two requests that meet
OVERHEAD_BATCH, OVERHEAD_STEPS = 16, 64
TURNS = 3
CACHE_GIB = 1.0


def bench_serve(
    model: str | Path, streams: list[int], peers: list[str], vllm_python: str | None, text: Path | None
) -> dict[str, Any]:
    """Measure a preset's network with random FP8 weights, or a folder's own.

    Ours and a peer's process take turns; medians are quoted. vllm_python: the interpreter of the environment that vLLM
    is installed in. text: a file that prompts are cut from; else they are random token ids.

    Raises:
        InputError: there is no such preset or model.
        RunError: our own side failed.
    """
    preset = None if isinstance(model, Path) else model
    folder = model if isinstance(model, Path) else random_model(model, "fp8", cache_root())
    cut = [str(text)] if text else []
    ours = [sys.executable, "-m", "leanseek.bench.serve", str(folder)]
    sides = {"leanseek": [*ours, "auto", *cut]}
    notes: list[str] = []
    if _drafts(folder):
        sides["leanseek without MTP"] = [*ours, "0", *cut]
    if "vllm-cpu" in peers:
        command = _vllm(preset, vllm_python, notes)
        if command:
            sides["vllm-cpu"] = command
    found: dict[str, Any] = {
        "benchmark": "serve", "model": str(model), "prompt_tokens": PROMPT, "new_tokens": NEW, "machine": machine(),
        "results": _alternate(sides, sorted({1, *streams}), notes),
    }  # fmt: skip
    return found | {
        "ratios": _ratios(found["results"]),
        "engine": _engine_figures([*ours, "0", *cut]),
        "start": _start_up(folder),
        "notes": notes,
    }


def _drafts(folder: Path) -> bool:
    return read_config(resolve(folder)).num_nextn_predict_layers > 0


def _vllm(preset: str | None, python: str | None, notes: list[str]) -> list[str] | None:
    """The peer's command over the same network in BF16, which is the fastest that it computes in."""
    if python is None:
        notes.append("vllm-cpu: not installed; --vllm-python PYTHON names the environment that has it (docs/bench.md)")
    elif preset is None:
        notes.append("vllm-cpu: compared on presets only")
    else:
        script, *arguments = peer_command("vllm_serve", str(random_model(preset, "bf16", cache_root())))[1:]
        return [python, script, str(Path(__file__).with_name("workers.py")), *arguments]
    return None


def _alternate(sides: dict[str, list[str]], streams: list[int], notes: list[str]) -> dict[str, Any]:
    """Every side at every number of streams, TURNS times in turn."""
    workers = {name: Worker(command) for name, command in sides.items()}
    try:
        for name in [n for n, worker in workers.items() if "error" in worker.ready]:
            notes.append(f"{name}: {workers.pop(name).ready['error']}")
        if "leanseek" not in workers:
            raise RunError(notes[-1])
        turns: dict[str, dict[int, list[dict[str, Any]]]] = {n: {count: [] for count in streams} for n in workers}
        for turn in range(TURNS):
            for count in streams:
                say(f"turn {turn + 1} of {TURNS}, {count} streams: {', '.join(workers)}")
                for name, worker in workers.items():
                    turns[name][count].append(_checked(name, worker.work(count)))
        return {name: {str(count): _median(runs) for count, runs in by.items()} for name, by in turns.items()}
    finally:
        for worker in workers.values():
            worker.close()


def _checked(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise RunError(f"{name} ended while measured: {answer['error']}")
    return answer


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of rates, sums of drafts, memory as it was at last."""
    found: dict[str, Any] = {}
    for key, last in runs[-1].items():
        if isinstance(last, list):
            found[key] = [sum(counts) for counts in zip(*(run[key] for run in runs), strict=True)]
        else:
            found[key] = last if key == "peak_memory_bytes" else statistics.median(run[key] for run in runs)
    if found.get("draft_tokens"):
        pairs = zip(found["accepted_tokens"], found["draft_tokens"], strict=True)
        found["acceptance"] = [accepted / drafted if drafted else None for accepted, drafted in pairs]
    return found


def _ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Our rate by number of streams, over one stream's and over every other side's."""
    own = {count: side["tokens_per_second"] for count, side in results["leanseek"].items()}
    return {
        count: {"one stream": rate / own["1"]}
        | {n: rate / by[count]["tokens_per_second"] for n, by in results.items() if n != "leanseek"}
        for count, rate in own.items()
    }


def _engine_figures(command: list[str]) -> dict[str, Any]:
    worker = Worker(command)
    try:
        return _checked("leanseek", worker.work(0))
    finally:
        worker.close()


# ---- start-up: a server of its own ----


class Server:
    """`leanseek serve` as a process, and when it was started."""

    def __init__(self, folder: Path, *options: str):
        self.started = time.perf_counter()
        command = [sys.executable, "-m", "leanseek", "serve", str(folder), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
        assert self.process.stderr
        said = self.process.stderr.readline()
        match = re.search(r" at http://([^:]+):(\d+)", said)
        if not match:
            raise RunError(f"leanseek serve said: {said.strip() or 'nothing'}")
        self.host, self.port = match[1], int(match[2])

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=300)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        if answer.status != 200:
            raise RunError(f"{path} answered {answer.status}: {content}")
        return content

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()


def _start_up(folder: Path) -> dict[str, float]:
    """Seconds from the start of `leanseek serve` until it listens, and to its first answer; the files are in memory."""
    best: dict[str, float] = {}
    for _ in range(2):
        server = Server(folder)
        listening = time.perf_counter() - server.started
        try:
            server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 1})
        finally:
            answered = time.perf_counter() - server.started
            server.close()
        if not best or answered < best["seconds_to_first_answer"]:
            best = {"seconds_to_listening": listening, "seconds_to_first_answer": answered}
    return best


# ---- the worker ----


def _prompts(engine: Engine, text: str | None) -> Callable[[int], list[int]]:
    """prompt(length): token ids, other ones each time."""
    generator = random.Random(0)
    ids: list[int] = []
    if text:
        if engine.tokenizer is None:
            raise InputError("prompts out of a text need a tokenizer.json beside the model")
        ids = engine.tokenizer.encode(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)

    def prompt(length: int) -> list[int]:
        if not ids:
            return [generator.randrange(2, engine.config.vocab_size) for _ in range(length)]
        start = generator.randrange(len(ids))
        return list(itertools.islice(itertools.cycle(ids), start, start + length))

    return prompt


def _streams(engine: Engine, prompt: Callable[[int], list[int]], count: int) -> dict[str, Any]:
    """`count` requests at once: rates over the whole time, and over the steps after all had begun."""
    before = engine.stats()
    _add(engine, "stream", [prompt(PROMPT) for _ in range(count)], NEW)
    begun: set[str] = set()
    decoding, decoded = 0.0, 0
    start = time.perf_counter()
    while engine.has_work():
        step = time.perf_counter()
        everyone = len(begun) == count
        deltas = engine.step()
        if everyone:
            decoding += time.perf_counter() - step
            decoded += sum(len(delta.token_ids) for delta in deltas)
        begun |= {delta.request_id for delta in deltas if delta.token_ids}
    seconds = time.perf_counter() - start
    after = engine.stats()
    return {
        "tokens_per_second": count * NEW / seconds,
        "decode_tokens_per_second": decoded / decoding,
        "draft_tokens": _since(after.draft_tokens, before.draft_tokens),
        "accepted_tokens": _since(after.accepted_tokens, before.accepted_tokens),
    }


def _since(after: list[int], before: list[int]) -> list[int]:
    return [a - b for a, b in itertools.zip_longest(after, before, fillvalue=0)]


def _add(engine: Engine, name: str, prompts: list[list[int]], new: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(f"{name}-{i}", prompt, params))


def _figures(engine: Engine, prompt: Callable[[int], list[int]]) -> dict[str, Any]:
    """What the engine alone can tell: of its cache, its overhead, and of a short request that meets a long one."""
    stats = engine.stats()
    held = stats.pages_total * stats.page_size * engine.kv_bytes_per_token
    long = min(LONG, engine.max_model_len - 2)
    alone = [_first_token(engine, prompt(SHORT)) for _ in range(TURNS)]
    behind = []
    for _ in range(TURNS):
        _add(engine, "long", [prompt(long)], 1)
        engine.step()  # it has begun
        behind.append(_first_token(engine, prompt(SHORT)))
        while engine.has_work():
            engine.step()
    first = statistics.median(alone)
    return {
        "cache_bytes_per_token": engine.kv_bytes_per_token,
        "cache_bytes": stats.cache_bytes,
        "page_overhead": 1 - held / stats.cache_bytes,
        "short_prompt": SHORT,
        "long_prompt": long,
        "first_token_seconds": first,
        "first_token_seconds_behind_long": statistics.median(behind),
        "first_token_ratio": statistics.median(behind) / first,
        "overhead": _overhead(engine, prompt),
    }


def _first_token(engine: Engine, prompt: list[int]) -> float:
    start = time.perf_counter()
    _add(engine, "short", [prompt], 1)
    while not any(delta.request_id == "short-0" and delta.token_ids for delta in engine.step()):
        pass
    return time.perf_counter() - start


def _overhead(engine: Engine, prompt: Callable[[int], list[int]]) -> dict[str, float]:
    """The share of a decode step's time, at a batch size, that is not the model's."""
    _add(engine, "batch", [prompt(PROMPT) for _ in range(OVERHEAD_BATCH)], 2 * OVERHEAD_STEPS)
    begun: set[str] = set()
    while len(begun) < OVERHEAD_BATCH:
        begun |= {delta.request_id for delta in engine.step() if delta.token_ids}
    before = engine.stats()
    for _ in range(OVERHEAD_STEPS):
        engine.step()
    after = engine.stats()
    for i in range(OVERHEAD_BATCH):
        engine.abort(f"batch-{i}")
    engine.step()
    seconds = after.step_seconds - before.step_seconds
    forward = after.forward_seconds - before.forward_seconds
    return {
        "batch": OVERHEAD_BATCH,
        "step_seconds": seconds / OVERHEAD_STEPS,
        "forward_seconds": forward / OVERHEAD_STEPS,
        "share_outside_the_model": 1 - forward / seconds,
    }


def _worker(folder: str, speculate: str, text: str | None = None) -> None:
    options: dict[str, Any] = {} if speculate == "auto" else {"speculate": int(speculate)}
    engine = load_engine(folder, cache_gib=CACHE_GIB, packed_copy=False, **options)
    prompt = _prompts(engine, text)
    _streams(engine, prompt, 1)  # what is made at first use is made now

    serve({"pid": os.getpid()}, lambda count: _streams(engine, prompt, count) if count else _figures(engine, prompt))


if __name__ == "__main__":
    _worker(*sys.argv[1:])
