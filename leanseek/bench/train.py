"""Training speed of a preset in BF16 and in FP8: tokens per second, the share of the machine's GEMM rate, peak memory,
what a token's activations take; beside a peer's."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from typing import Any

import torch

from leanseek.bench.machine import fastest_dtype, machine
from leanseek.bench.workers import Worker, peer_command, say, serve
from leanseek.data.batch import Batch
from leanseek.machine.device import default_device
from leanseek.model import Transformer
from leanseek.planning import train_flops_per_token
from leanseek.training import RunConfig, Trainer
from leanseek.training.activations import activation_bytes_per_token
from leanseek.training.pace import random_batch

PEER_MODES = ("float32", "autocast", "bfloat16")


def bench_train(preset: str, batch: int, seq_len: int, steps: int, peers: list[str]) -> dict[str, Any]:
    """Alternate our steps, in both precisions, and the peer's, five turns each, and quote medians and ratios."""
    run = _run(preset, batch, seq_len)
    limits = machine()
    command = [sys.executable, "-m", "leanseek.bench.train", preset, str(batch), str(seq_len)]
    sides = {"leanseek": [*command, "bf16"], "leanseek fp8": [*command, "fp8"]}
    notes = []
    if "transformers" in peers:
        config = json.dumps(run.model.to_hf())
        for mode in PEER_MODES:
            if mode != "float32" and limits["emulated"]:  # a step would take minutes
                notes.append(f"transformers {mode}: left out, torch emulates bfloat16 here")
                continue
            sides[f"transformers {mode}"] = peer_command("transformers_train", mode, str(batch), str(seq_len), config)
    results = _alternate(sides, steps, batch * seq_len, notes)
    flops = train_flops_per_token(run.model, seq_len)
    own, fp8 = results["leanseek"], results["leanseek fp8"]
    after = machine()  # others may have been at work before
    limits |= {key: max(limits[key], value) for key, value in after.items() if key.startswith("gemm_")}
    gemm = f"gemm_flops_{fastest_dtype(limits)}"
    for side in results.values():
        side["flops_per_second"] = side["tokens_per_second"] * flops
        limits[gemm] = max(limits[gemm], side["flops_per_second"])
    for side in results.values():
        side["share_of_best_gemm"] = side["flops_per_second"] / limits[gemm]
    found: dict[str, Any] = {
        "benchmark": "train", "preset": preset, "batch": batch, "seq_len": seq_len, "flops_per_token": flops,
        "machine": limits, "results": results, "notes": notes,
        "fp8_speed_ratio": fp8["tokens_per_second"] / own["tokens_per_second"],
        "fp8_activation_ratio": fp8["activation_bytes_per_token"] / own["activation_bytes_per_token"],
    }  # fmt: skip
    theirs = {name: side for name, side in results.items() if not name.startswith("leanseek")}
    if theirs:
        best = max(theirs, key=lambda name: theirs[name]["tokens_per_second"])
        found["best_peer"] = best
        found["speed_ratio"] = own["tokens_per_second"] / theirs[best]["tokens_per_second"]
        found["memory_ratio"] = own["peak_memory_bytes"] / theirs[best]["peak_memory_bytes"]
    return found


def _alternate(sides: dict[str, list[str]], steps: int, tokens: int, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Start every side, drop those that fail with a note, and let them take turns."""
    say(f"starting {', '.join(sides)}")
    workers = {name: Worker(command) for name, command in sides.items()}
    try:
        for name in [n for n, w in workers.items() if "error" in w.ready]:
            notes.append(f"{name}: {workers.pop(name).ready['error']}")
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        last: dict[str, dict[str, Any]] = {}
        for turn in range(5):
            for name, worker in workers.items():
                say(f"turn {turn + 1} of 5: {name}")
                last[name] = worker.work(steps)
                seconds[name] += last[name]["seconds"]
        return {
            name: {
                "tokens_per_second": tokens / statistics.median(times),
                "fastest_tokens_per_second": tokens / min(times),
                "peak_memory_bytes": last[name]["peak_memory_bytes"],
                "steps": len(times),
                **{key: value for key, value in workers[name].ready.items() if key == "activation_bytes_per_token"},
            }
            for name, times in seconds.items()
        }
    finally:
        for worker in workers.values():
            worker.close()


def _run(preset: str, batch: int, seq_len: int, precision: str = "bf16") -> RunConfig:
    run = RunConfig.load(preset, [])
    return dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, batch_size=batch, precision=precision),
        data=dataclasses.replace(run.data, seq_len=seq_len),
    )


def profile(preset: str, batch: int, seq_len: int) -> str:
    """torch's profile of one step in each precision: what it is spent on."""
    cuda = default_device().type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    tables = []
    for precision in ("bf16", "fp8"):
        trainer, inputs = _ready(_run(preset, batch, seq_len, precision))
        trainer.step(inputs, 0)
        with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as found:
            trainer.step(inputs, 0)
        by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        tables += [precision, found.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=45)]
        del trainer
    return "\n".join(tables)


def _ready(run: RunConfig) -> tuple[Trainer, Batch]:
    """A trainer and a batch of random tokens for it."""
    device = default_device()
    model = Transformer(run.model, device).init_weights(0)
    return Trainer(run, model), random_batch(run)


def _worker(preset: str, size: str, seq_len: str, precision: str) -> None:
    trainer, batch = _ready(_run(preset, int(size), int(seq_len), precision))
    kept = activation_bytes_per_token(trainer, batch.tokens[:1].expand(2, -1))
    trainer.step(batch, 0)

    def work(rounds: int) -> dict[str, Any]:
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            trainer.step(batch, 0)
            seconds.append(time.perf_counter() - start)
        memory = {"peak_memory_bytes": torch.cuda.max_memory_allocated()} if trainer.device.type == "cuda" else {}
        return {"seconds": seconds, **memory}

    serve({"pid": os.getpid(), "activation_bytes_per_token": kept}, work)


if __name__ == "__main__":
    _worker(*sys.argv[1:5])
