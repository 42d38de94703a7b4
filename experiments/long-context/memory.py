"""Memory of a training step per token: the peak over a step of T tokens, less that of a step of 64, by T.

    python memory.py 8192 [--preset bench-30m] [--precision fp8] [--recompute]     # prints a line of JSON

Weights, gradients and moments are in both peaks, so what is left is what a token takes: activations kept for backward
and the work space of the largest operation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch

from leanseek.data.batch import Batch
from leanseek.training import RunConfig, Trainer
from leanseek.training.config import DataConfig
from leanseek.training.pace import random_batch

SHORT = 64


def peak_of_step(trainer: Trainer, batch: Batch, step: int) -> int:
    """Bytes of this process at most while it does a step."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    trainer.step(batch, step)
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("length", type=int)
    parser.add_argument("--preset", default="bench-30m")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--recompute", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    preset = RunConfig.load(given.preset, [])
    run = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, max_position_embeddings=given.length),
        data=DataConfig(seq_len=given.length),
        train=dataclasses.replace(
            preset.train, batch_size=1, precision=given.precision, recompute=given.recompute, device="cpu"
        ),
    )
    trainer, batch = Trainer(run), random_batch(run)
    short = Batch(batch.tokens[:, : SHORT + run.model.lookahead], 1)
    trainer.step(short, 0)  # moments come into being
    fixed = peak_of_step(trainer, short, 1)
    start = time.process_time()
    peak = peak_of_step(trainer, batch, 2)
    print(json.dumps({
        **vars(given), "dtype": str(trainer.dtype).removeprefix("torch."), "fixed_bytes": fixed, "peak_bytes": peak,
        "bytes_per_token": (peak - fixed) / (given.length - SHORT), "cpu_seconds": time.process_time() - start,
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
