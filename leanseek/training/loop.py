"""A run from its first step to its report. Disk, clock and signals are handled here, not in the code that it calls.

Everything random is a function of (seed, step) or (seed, sample). A run is therefore a function of its configuration,
and a resumed run, which needs only a checkpoint and a step number, repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from leanseek import planning
from leanseek.checkpoint import CheckpointError
from leanseek.checkpoint.hf import load_pieces
from leanseek.checkpoint.training import (
    STATE,
    Resumed,
    newest_checkpoint,
    newest_whole,
    set_aside,
)
from leanseek.checkpoint.writer import Writer
from leanseek.config import ConfigError
from leanseek.errors import Interrupted, RunError
from leanseek.machine.probes import gemm_rate
from leanseek.model import Transformer
from leanseek.reading import parse_toml, read_toml
from leanseek.training.config import RunConfig
from leanseek.training.feed import Feed, TokenFeed
from leanseek.training.metrics import Metrics, Silent
from leanseek.training.origin import first_model, origin
from leanseek.training.part import Part
from leanseek.training.resume import changes
from leanseek.training.trainer import StepResult, Trainer
from leanseek.writing import LOCK, alone, replace_file, writing

MAX_SKIPPED = 3  # skipped steps in a row after which the run gives up


class Summary(NamedTuple):
    folder: Path
    step: int
    tokens: int
    val_loss: float | None  # of the last evaluation; None if not finite
    val_bits_per_byte: float | None
    seconds: float


class _Start(NamedTuple):
    """Where a run begins or continues."""

    trainer: Trainer
    step: int = 0
    skipped: int = 0  # skipped steps in a row just before this one
    origin: str = ""  # where the first weights came from, in words
    broken: tuple[str, ...] = ()  # checkpoints that were skipped, a line each
    changed: tuple[str, ...] = ()  # what differs from the checkpoint's run, a line each


def train(
    run: RunConfig,
    *,
    resume: bool = False,
    runs: Path = Path("runs"),
    compare: Path | None = None,
    prepare: Callable[[Transformer], None] | None = None,
    part: Part | None = None,
    feed: Callable[[RunConfig, Part], Feed] = TokenFeed,
) -> Summary:
    """Train to the last step; `resume` continues from the newest good checkpoint of the run of that name in `runs`.

    `compare` is another run's folder, whose curves the report also draws. `prepare` is called with the model before the
    first step, for experiments that change how it runs. `part` is what of the run this process does; all by default.
    `feed` opens what gives the batches, and says what is minimised.

    Raises:
        ConfigError: the run exists and `resume` is not set, there is nothing to resume or to compare with, another
            process trains into its folder, or the folder cannot be written.
        DataError: the shards are unusable.
        RunError: loss or gradients stay non-finite, or the disk is full; the message says what can be resumed.
        Interrupted: SIGINT or SIGTERM arrived; the last step is saved.
    """
    folder = runs / run.name
    if compare is not None and not (compare / "metrics.jsonl").is_file():
        raise ConfigError(f"{compare} is not the folder of a run: it has no metrics.jsonl")
    if resume and not folder.is_dir():
        raise ConfigError(f"{folder} holds no run to resume; leave --resume away to start it")
    try:
        part = part or Part()
        with writing(folder, "make room"), _alone(folder) if part.writes else contextlib.nullcontext():
            return _train(run, folder, resume, compare, prepare, part, feed)
    except RunError as error:
        raise type(error)(f"{error}; {_standing(folder)}") from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Locks the folder, created if needed. The kernel releases the lock when the process ends.

    Raises:
        ConfigError: another process trains into it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    taken = ConfigError(f"{folder} is being trained by another process; wait, or choose another --name")
    with alone(folder / LOCK, taken):
        try:
            yield
        finally:
            if made and [p.name for p in folder.iterdir()] == [LOCK]:  # the run wrote nothing
                (folder / LOCK).unlink()
                folder.rmdir()


def _standing(folder: Path) -> str:
    """What a failed run can resume from: its newest checkpoint with correct checksums, if any."""
    found = newest_whole(folder)
    return f"checkpoints/{found.name} is whole: continue with --resume" if found else "there is no checkpoint to resume"


def _train(
    run: RunConfig,
    folder: Path,
    resume: bool,
    compare: Path | None,
    prepare: Callable[[Transformer], None] | None,
    part: Part,
    open_feed: Callable[[RunConfig, Part], Feed],
) -> Summary:
    feed = open_feed(run, part)
    run = run.with_tokens(feed.special.bos, feed.special.eos)
    with _Signals() as signals:
        start = _resume(run, folder, feed, part) if resume else _begin(run, folder, feed, part)
        feed.attach(start.trainer)
        if prepare is not None:
            prepare(start.trainer.model)
        keep = run.checkpoint.keep_last, run.checkpoint.keep_every
        output = Metrics(folder, run.train.steps, start.step) if part.writes else Silent()
        with output as metrics, Writer(folder, *keep, part.about("the checkpoint")) as writer:
            loop = _Loop(run, folder, start, feed, metrics, writer)
            for step in range(start.step, run.train.steps):
                loop.step(step)
                if part.any(signals.received):
                    loop.checkpoint(step + 1)
                    raise Interrupted(f"stopped at step {step + 1}; continue with --resume")
    part.draw(folder / "timeline.svg")
    if part.writes:
        from leanseek.training.report import write_report  # matplotlib takes a second to import

        write_report(folder, compare)
    seen = metrics.last
    return Summary(
        folder, run.train.steps, feed.tokens, seen.get("val_loss"), seen.get("val_bits_per_byte"), metrics.elapsed
    )


def _begin(run: RunConfig, folder: Path, feed: Feed, part: Part) -> _Start:
    written = part.writes and folder.exists()
    if written and any(not p.name.startswith(".") for p in folder.iterdir()):  # .X.partial: killed at the start
        raise ConfigError(f"{folder} exists; continue it with --resume, or choose another --name")
    return _first(run, folder, feed, part)


def _first(run: RunConfig, folder: Path, feed: Feed, part: Part) -> _Start:
    """A run before its first step."""
    words, lines = origin(run.source, feed.folder)
    model = first_model(run.source, run.train.seed, run.model, part)
    trainer = Trainer(run, model, part, feed.objective)
    if part.writes:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "config.toml", run.to_toml().encode())
    return _Start(trainer, origin=words, changed=tuple(lines))


def _resume(run: RunConfig, folder: Path, feed: Feed, part: Part) -> _Start:
    if not (folder / "config.toml").is_file():
        if all(p.name.startswith(".") for p in folder.iterdir()):  # killed before its first file
            return _first(run, folder, feed, part)
        raise ConfigError(f"{folder} holds no run to resume; leave --resume away to start it")
    before = type(run).from_dict(read_toml(folder / "config.toml", ConfigError))
    if before.source != run.source:
        began = f"the weights of {before.source}" if before.source else "random weights"
        raise ConfigError(f"from = {run.source!r}, but {folder} began with {began}; a run keeps its beginning")
    if before.model != run.model:
        pairs = ((f.name, getattr(before.model, f.name), getattr(run.model, f.name)) for f in fields(before.model))
        key, was, now = next((key, was, now) for key, was, now in pairs if was != now)
        raise ConfigError(f"model.{key} = {now!r}, but {folder} has {was!r}; a run keeps its network")
    found, broken = newest_checkpoint(folder, part.about("the reading of a checkpoint"))
    if broken and found is None:
        raise ConfigError(f"no checkpoint in {folder} is whole ({broken[0]}); start again under another --name")
    if found is None:  # killed before the first checkpoint
        return _first(run, folder, feed, part)
    if run.train.steps < found.step:
        raise ConfigError(f"train.steps = {run.train.steps}, but {folder} has done {found.step} steps already")
    then = _config_of(found, before)
    moved = feed.resume(then, found)
    trainer = _restored(run, found, part, feed)
    part.gather(None)  # all ranks have read
    if part.writes:
        set_aside(folder, found.step)
        replace_file(folder / "config.toml", run.to_toml().encode())
    lines = (*changes(then, run, found.step), *moved)
    skipped = int(found.state.get("skipped", 0))
    return _Start(trainer, found.step, skipped, broken=tuple(broken), changed=lines)


def _config_of(found: Resumed, before: RunConfig) -> RunConfig:
    """The configuration that a checkpoint was trained with; config.toml's if it does not store one."""
    stored = found.state.get("config")
    return (
        before
        if stored is None
        else type(before).from_dict(parse_toml(stored, f"{found.folder / STATE}: config", CheckpointError))
    )


def _restored(run: RunConfig, found: Resumed, part: Part, feed: Feed) -> Trainer:
    model = part.model(run.model)
    load_pieces(found.folder, part.pieces(model))
    trainer = Trainer(run, model, part, feed.objective)
    trainer.load_state_tensors(found.tensors, found.state.get("without_moments"))
    if "guard" in found.state:  # older checkpoints have no guard
        trainer.guard.load_state(found.state["guard"])
    return trainer


def _arithmetic(run: RunConfig, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if run.train.precision == "bf16" else f"{name}, linears in {run.train.precision}"


class _Signals:
    """Notes SIGINT and SIGTERM, to stop at the end of the step; a second one acts at once."""

    def __init__(self) -> None:
        self.received = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _Loop:
    """The work around a step: its batch, its metrics row, and evaluation and checkpoints when they are due."""

    def __init__(
        self,
        run: RunConfig,
        folder: Path,
        start: _Start,
        feed: Feed,
        metrics: Metrics,
        writer: Writer,
    ):
        self.run, self.trainer, self.skipped, self.writer = run, start.trainer, start.skipped, writer
        self.feed, self.metrics, self.part = feed, metrics, start.trainer.part
        self.flops = planning.train_flops_per_token(run.model, run.data.seq_len)
        device, dtype = start.trainer.device, start.trainer.dtype
        self.peak = 0.0
        self._probe()
        self.saved = start.step
        for line in start.broken:
            metrics.event(start.step, "passed_over", line)
        what = "resumed" if start.step else "started"
        metrics.event(
            start.step,
            what,
            f"{folder} {what} at step {start.step}{start.origin}: {device.type}, {_arithmetic(run, dtype)}, "
            f"{self.part.in_words(torch.get_num_threads())}; matrix products reach {self.peak / 1e9:,.0f} GFLOP/s here"
            f"{feed.words and '; '}{feed.words}",
        )
        for note in run.notes:
            metrics.say(note)

        for line in start.changed:
            metrics.event(start.step, "changed", line)

    def step(self, step: int) -> None:
        """Run step `step` (from 0) and what is due after it.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        t = self.run.train
        self.writer.poll()
        self.part.begin(step)
        started = time.perf_counter()
        before = self.feed.tokens
        batch = self.feed.batch(step)
        result = self.trainer.step(batch, step)
        seconds = time.perf_counter() - started
        done = step + 1
        if done % t.log_every == 0 or done == t.steps or not result.applied:
            self._log(done, batch.sequences, self.feed.tokens - before, seconds, result)
        self._note_skipped(done, result)
        if done % t.eval_every == 0 or done == t.steps:
            self._evaluate(done)
        if done % self.run.checkpoint.every == 0 or done == t.steps:
            self.checkpoint(done)

    def checkpoint(self, step: int) -> None:
        """Begin to write the checkpoint of the state after `step` steps, unless that was done.

        Raises:
            RunError: a weight is not finite, or the disk is full; older checkpoints are untouched.
        """
        if step == self.saved:
            return
        if culprit := self.trainer.nonfinite_weight():
            raise RunError(
                f"step {step}: weight {culprit} is not finite, so no checkpoint was written: lower optimizer.lr"
            )
        state = {
            **self.feed.state(),
            "config": self.run.to_toml(),
            "without_moments": self.trainer.without_moments(),
            "skipped": self.skipped,
            "guard": self.trainer.guard.state(),
        }
        weights, moments = self.trainer.pieces()
        self.metrics.sync()  # rows must be on disk before the checkpoint
        self.writer.save(step, self.run.model, weights, moments, state, self.feed.folder)
        self.saved = step

    def _probe(self) -> None:
        """Measure the GEMM rate for MFU; we keep the best one, because other processes may be busy."""
        device = self.trainer.device
        if device.type == "cpu" or not self.peak:  # later, a GPU may not have the memory for it
            size = 1024 if device.type == "cpu" else None
            self.part.gather(None)  # all ranks measure at the same time
            rate = gemm_rate(self.trainer.dtype, device, size, seconds=0.3)
            self.peak = max(self.peak, sum(self.part.gather(rate)))

    def _log(self, step: int, size: int, tokens: int, seconds: float, result: StepResult) -> None:
        rate = tokens / seconds
        self.peak = max(self.peak, rate * self.flops)  # a step is faster if others were busy during the probe
        row: dict[str, Any] = {
            "step": step,
            "tokens": self.feed.tokens,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": rate,
            "flops_per_second": rate * self.flops,
            "mfu": rate * self.flops / self.peak,
            "elapsed_s": self.metrics.elapsed,
            "batch_size": size,
            "max_violation": max(result.max_violation.values(), default=0.0),
        }
        if self.run.model.num_nextn_predict_layers:
            row["mtp_loss"] = result.mtp_loss
        if self.run.balance.sequence_alpha or self.run.balance.switch_alpha:
            row["balance_loss"] = result.balance_loss
        if result.counts:
            row["max_violation_per_layer"] = {str(k): round(v, 4) for k, v in result.max_violation.items()}
        every = max(1, self.run.train.steps // 100)  # for about a hundred columns in the report's heat map
        if result.counts and step % every == 0:
            counted = {k: c for k, c in result.counts.items() if c.any()}  # an MTP module's layer may have no part
            row["load"] = {str(k): [round(x, 5) for x in (c / c.sum()).tolist()] for k, c in counted.items()}
        if ranks := self.part.seconds(seconds):
            row["ranks"] = ranks
        self.metrics.write(row | self.feed.figures() | self.trainer.objective.figures())
        self.metrics.show(step, f"loss {result.loss:.3f}  {rate:,.0f} tok/s  MFU {row['mfu']:.0%}")

    def _note_skipped(self, step: int, result: StepResult) -> None:
        """Report a skipped step and why, and stop after too many in a row."""
        if result.applied:
            self.skipped = 0
            return
        self.skipped += 1
        message = f"step {step}: {result.reason}; loss {result.loss}, gradient norm {result.grad_norm}"
        self.metrics.event(step, "skipped", f"{message}; the step is left out")
        if self.skipped >= MAX_SKIPPED:
            raise RunError(f"{message}, the {self.skipped}th step in a row: lower optimizer.lr")

    def _evaluate(self, step: int) -> None:
        if (found := self.feed.evaluate(self.trainer, step)) is None:
            return
        self.metrics.write({"step": step, "tokens": self.feed.tokens, **found.figures})
        self._probe()
        self.metrics.say(f"step {step}: {found.line}")
