"""Writes training checkpoints: a copy is taken at once, and written while the run goes on.

The threads that write do not talk to other ranks: collectives of two threads could meet in another order on another
rank, and a thread would wait for a rank that died. Instead, while a checkpoint is being written, the ranks tell each
other before every step how far they are. So all of them see it become whole, or fail, in the same step.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from leanseek.checkpoint import shares
from leanseek.checkpoint.files import INDEX, CheckpointError, write_file, write_json
from leanseek.checkpoint.hf import dtype_keys, write_config
from leanseek.checkpoint.pieces import Piece
from leanseek.checkpoint.ranks import Outcome, Ranks, agreed, failing_together, outcome
from leanseek.checkpoint.tokenizer import copy_tokenizer
from leanseek.checkpoint.training import PIECES, STATE, checkpoint_folder, checksum, crc32, prune
from leanseek.config import ModelConfig
from leanseek.errors import Interrupted, RunError
from leanseek.machine.memory import available
from leanseek.writing import writing

SEEN_WITHIN = 30.0  # seconds that a shared file system may take to show a new folder on other nodes
_MADE = ".made"  # in a partial folder: a number by which ranks know that they see the same one


class _Task(threading.Thread):
    """Work in a thread that does not keep the process alive; `found` is its outcome, None before the end."""

    def __init__(self, work: Callable[[], object]):
        super().__init__(daemon=True)
        self.work = work
        self.found: Outcome | None = None
        self.start()

    def run(self) -> None:
        self.found = outcome(self.work)


class Writer:
    """Writes the checkpoints of the run in folder `run`, one at a time.

    All ranks of a run call `save`, `poll` and `wait` at the same points. Leaving the `with` block waits for what is
    being written, unless by an error that other ranks may not have seen.
    """

    def __init__(self, run: Path, keep_last: int, keep_every: int = 0, ranks: Ranks | None = None):
        self.run, self.keep_last, self.keep_every, self.ranks = run, keep_last, keep_every, ranks or Ranks()
        self.task: _Task | None = None  # what this rank's thread is at
        self.finish: Callable[[list[Any]], None] | None = None  # what rank 0 does when all have written
        self.partial = run

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        everywhere = (RunError, Interrupted) if self.ranks.ranks > 1 else Exception
        if kind is None or issubclass(kind, everywhere):
            self.wait()

    def save(
        self,
        step: int,
        config: ModelConfig,
        weights: Sequence[Piece],
        state: Sequence[Piece],
        values: dict[str, Any],
        tokenizer_from: Path,
    ) -> None:
        """Copy the tensors and begin to write `run/checkpoints/step-N`, which has its name when all is on disk.

        weights, state: what this rank writes of the network's state dict, and of moments and the like. The pieces of
        all ranks hold every value once. values: for state.json; rank 0's are written. Where memory does not suffice for
        the copies of all ranks on a node, the checkpoint is written before this returns.

        Raises:
            CheckpointError: the pieces do not make up the whole.
            RunError, InputError: a rank cannot write; older checkpoints are untouched.
        """
        self.wait()
        self.partial = checkpoint_folder(self.run, step).with_name(f".step-{step}.partial")
        self._make_folder()
        fits, plan = self._planned(config, weights, state)
        copy = shares.copied if fits else torch.Tensor.detach
        model = shares.weights_to_write(weights, plan, self.ranks, copy)
        moments, ranges = shares.state_to_write(state, copy)
        if any(piece.tensor.device.type == "cuda" for piece in (*weights, *state)):
            torch.cuda.synchronize()  # the copies are complete

        def write() -> dict[str, list[int]]:
            """Bytes and CRC-32 of each file."""
            files = {}
            if model:
                name = _file("model", self.ranks.rank, plan.writers)
                files[name] = write_file(self.partial / name, model)
            if self.ranks.rank in plan.state_writers:
                name = _file("state", self.ranks.rank, plan.state_writers)
                about = {PIECES: json.dumps(ranges)} if ranges else None
                files[name] = write_file(self.partial / name, moments, about)
            return files

        self.finish = functools.partial(self._finish, step, config, plan, values, tokenizer_from)
        self._begin(write)
        if not fits:
            self.wait()

    def _planned(
        self, config: ModelConfig, weights: Sequence[Piece], state: Sequence[Piece]
    ) -> tuple[bool, shares.Plan]:
        """Whether every node has memory for its ranks' copies, and who writes what."""
        need = sum(piece.tensor.nbytes for piece in (*weights, *state))
        own = [socket.gethostname(), need, available(), shares.entries(weights), shares.entries(state)]
        hosts, needs, free, all_weights, all_state = zip(*self.ranks.gather(own), strict=True)
        together = Counter[str]()
        for host, size in zip(hosts, needs, strict=True):
            together[host] += size
        # twice: the next step needs memory too
        fits = all(2 * together[host] <= size for host, size in zip(hosts, free, strict=True))
        return fits, shares.plan(config, list(map(shares.heard, all_weights)), list(map(shares.heard, all_state)))

    def poll(self) -> None:
        """Take a checkpoint that is being written as far as goes without waiting; costs nothing if there is none.

        Raises:
            RunError, InputError: a rank could not write its part; older checkpoints are untouched.
        """
        self._advance(wait=False)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is whole.

        Raises:
            RunError, InputError: as `poll`.
        """
        self._advance(wait=True)

    def _advance(self, wait: bool) -> None:
        while self.task is not None:
            if wait:
                self.task.join()
            try:
                files = agreed(self.ranks, self.task.found)
            except Exception:
                self.task = None
                if self.ranks.rank == 0:
                    shutil.rmtree(self.partial, ignore_errors=True)
                raise
            if files is None:
                return
            self.task, finish, self.finish = None, self.finish, None
            if finish is not None:
                self._begin(functools.partial(finish, files) if self.ranks.rank == 0 else lambda: None)

    def _begin(self, work: Callable[[], object]) -> None:
        def guarded() -> object:
            with writing(self.run, "make room"):
                return work()

        self.task = _Task(guarded)

    def _make_folder(self) -> None:
        """An empty `self.partial`, made by rank 0 and seen by all.

        Raises:
            RunError, InputError: it cannot be written, or a rank has another file system there.
        """
        mark = self.ranks.gather(secrets.token_hex(8))[0]
        with failing_together(self.ranks):
            if self.ranks.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
                with writing(self.run, "make room"):
                    self.partial.mkdir(parents=True)
                    (self.partial / _MADE).write_text(mark, encoding="ascii")
        with failing_together(self.ranks):
            _see(self.partial, mark)

    def _finish(
        self,
        step: int,
        config: ModelConfig,
        plan: shares.Plan,
        values: dict[str, Any],
        tokenizer_from: Path,
        written: list[dict[str, list[int]]],
    ) -> None:
        """Write what there is once a checkpoint, sync everything, and give the folder its name."""
        (self.partial / _MADE).unlink()
        write_config(config, dtype_keys(plan.dtype), self.partial)
        copy_tokenizer(tokenizer_from, self.partial, config)
        if len(plan.writers) > 1:
            weights = {one.name: _file("model", one.owner, plan.writers) for one in plan.tensors.values()}
            write_json(self.partial / INDEX, {"metadata": {"total_size": plan.bytes}, "weight_map": weights})
        files = {name: size for one in written for name, size in one.items()}
        files |= {p.name: [p.stat().st_size, crc32(p)] for p in sorted(self.partial.iterdir()) if p.name not in files}
        state = values | {"step": step, "files": files}
        text = json.dumps(state | {"checksum": checksum(state)}, indent=1)
        (self.partial / STATE).write_text(text, encoding="utf-8")
        for path in (*self.partial.iterdir(), self.partial):
            _sync(path)
        final = checkpoint_folder(self.run, step)
        self.partial.rename(final)
        _sync(final.parent)
        prune(self.run, self.keep_last, self.keep_every)


def _file(kind: str, rank: int, writers: list[int]) -> str:
    """The name of a rank's file, as Hugging Face numbers them."""
    if len(writers) == 1 or rank not in writers:
        return f"{kind}.safetensors"
    return f"{kind}-{writers.index(rank) + 1:05}-of-{len(writers):05}.safetensors"


def _see(partial: Path, mark: str) -> None:
    """Check that rank 0 made the folder that is here."""
    until = time.monotonic() + SEEN_WITHIN
    while True:
        with contextlib.suppress(OSError):
            if (partial / _MADE).read_text(encoding="ascii") == mark:
                return
        if time.monotonic() > until:
            raise CheckpointError(
                f"{partial}, which rank 0 made, is not on this rank's disk: put the run's folder on a file system that "
                "all nodes share"
            )
        time.sleep(0.05)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
