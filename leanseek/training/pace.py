"""Measures how fast this machine trains a network, and so how many steps fit into a given time."""

from __future__ import annotations

import dataclasses
import time

import torch

from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.training.config import RunConfig
from leanseek.training.part import Part
from leanseek.training.trainer import Trainer

TIMED = 3  # timed steps, after a warm-up step


def random_batch(run: RunConfig) -> Batch:
    """A batch of random ids: as much work as a real one."""
    shape = (run.train.batch_size, run.data.seq_len + run.model.lookahead)
    ids = torch.randint(0, run.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return Batch(ids, run.train.batch_size)


def tokens_per_second(run: RunConfig, part: Part) -> float:
    """Measures a few steps of a temporary network. Includes evaluations, at a third of the cost per sequence."""
    trainer, own = Trainer(run, part=part), part.share(run.train.batch_size)
    batch = random_batch(run).rows(own.start, own.stop)
    trainer.step(batch, 0)
    start = time.perf_counter()
    for _ in range(TIMED):
        trainer.step(batch, 0)
    t = run.train
    evaluated = t.eval_sequences / (t.eval_every * t.batch_size)  # evaluated sequences per trained sequence
    return TIMED * t.batch_size * run.data.seq_len / (time.perf_counter() - start) / (1 + evaluated / 3)


def fit_steps(run: RunConfig, minutes: float, part: Part | None = None) -> tuple[RunConfig, str]:
    """`run` with at most as many steps as this machine can do in `minutes`, its warm-up shortened in proportion, and a
    line that says so.

    Raises:
        ConfigError: not even one step fits.
    """
    part = part or Part()
    rate = min(part.gather(tokens_per_second(run, part)))
    size = run.train.batch_size * run.data.seq_len  # a batch size ramp only makes it shorter
    fitting = int(minutes * 60 * rate / size)
    if fitting < 1:
        raise ConfigError(
            f"this machine trains {rate:,.0f} tokens/s, so no step of {size:,} tokens fits into {minutes:g} minutes"
        )
    steps = min(run.train.steps, fitting)
    warmup = round(run.schedule.warmup_steps * steps / run.train.steps)
    fitted = dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, steps=steps),
        schedule=dataclasses.replace(run.schedule, warmup_steps=warmup),
    )
    what = "all" if steps == run.train.steps else "instead of"
    return fitted, (
        f"this machine trains {rate:,.0f} tokens/s: {steps:,} steps ({what} {run.train.steps:,}), "
        f"about {steps * size / rate / 60:.1f} minutes"
    )
