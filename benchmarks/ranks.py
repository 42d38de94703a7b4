"""Training on two processes of one thread beside one process of two, by turns on this machine.

    python benchmarks/ranks.py --out FILE.json

One process, data parallelism, and expert parallelism train the same network on the same batch. A ratio above 1 means
that two processes are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from leanseek.bench.machine import machine

LAYOUTS = {"one process": (1, []), "dp2": (2, []), "ep2": (2, ["parallel.ep=2"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bench-30m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    common = [f"train.batch_size={given.batch}", f"data.seq_len={given.seq_len}", f"train.precision={given.precision}"]
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for number in range(given.rounds):
        for name, (processes, layout) in LAYOUTS.items():
            seconds[name] += _measure(processes, given.preset, [*common, *layout])
            print(f"round {number + 1}, {name}: {statistics.median(seconds[name]):.3f} s a step", file=sys.stderr)
    tokens = given.batch * given.seq_len
    results = {f"leanseek, {name}": {"tokens_per_second": tokens / statistics.median(s)} for name, s in seconds.items()}
    alone = results["leanseek, one process"]["tokens_per_second"]
    report: dict[str, Any] = {
        "benchmark": "ranks", "preset": given.preset, "batch": given.batch, "seq_len": given.seq_len,
        "precision": given.precision, "machine": machine(), "results": results,
        "ratios": {name: figures["tokens_per_second"] / alone for name, figures in results.items()},
        "seconds": seconds,
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


def _measure(processes: int, preset: str, settings: list[str]) -> list[float]:
    """Seconds of a few steps, in processes of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--worker", preset, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // processes)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _worker(preset: str, settings: list[str]) -> None:
    from leanseek.config import ModelConfig
    from leanseek.distributed import join
    from leanseek.training import RunConfig, Trainer
    from leanseek.training.pace import random_batch

    sections: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = int(value) if value.isdigit() else value
    run = RunConfig.from_dict({"name": "ranks", "model": ModelConfig.preset(preset).to_dict(), **sections})
    with join(run) as part:
        trainer, own = Trainer(run, part=part), part.share(run.train.batch_size)
        batch = random_batch(run).rows(own.start, own.stop)
        seconds = []
        for step in range(5):
            part.any(False)
            start = time.perf_counter()
            trainer.step(batch, step)
            seconds.append(time.perf_counter() - start)
        if part.writes:
            print(json.dumps(seconds[1:]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2], sys.argv[3:])
    else:
        main()
