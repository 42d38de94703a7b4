"""Processes of a run: `--nproc N` on this machine, or those that torchrun starts on each node."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, Std, start_processes

from leanseek.distributed.mesh import build_mesh, check_layout
from leanseek.distributed.ranks import RankPart
from leanseek.errors import InputError, RunError
from leanseek.training.config import RunConfig
from leanseek.training.part import Part

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective


def launched() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def join(run: RunConfig) -> Iterator[Part]:
    """This process's part of `run`: a rank's under torchrun or `--nproc`, else everything.

    Raises:
        ConfigError: the layout does not fit the processes.
        RunError: another rank is gone.
    """
    if not launched():
        check_layout(run, 1)
        yield Part()
        return
    check_layout(run, int(os.environ["WORLD_SIZE"]))
    cuda = torch.cuda.is_available() and run.train.device != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    device = "cuda" if cuda else "cpu"
    try:
        yield RankPart(run, build_mesh(run, device), device)
    except (InputError, RunError) as error:
        _report(error)
        raise
    except RuntimeError as error:
        if not _left(error):
            raise
        raise RunError(f"rank {os.environ['RANK']}: another rank is gone ({str(error).splitlines()[0]})") from None
    finally:
        dist.destroy_process_group()


def _left(error: Exception) -> bool:
    """Whether a collective failed because a process at the other end is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _report(error: Exception) -> None:
    """Say the line where torch's launchers look for it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": str(error)}), encoding="utf-8")


def launch(processes: int, arguments: list[str]) -> int:
    """Run `leanseek ARGUMENTS` in that many processes of one group; returns the exit code.

    The first rank speaks to the user; what others write to stderr is shown if one of them is the first to fail. When
    one fails the others are stopped. SIGINT and SIGTERM are passed on, so that the run is saved.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),
    }
    envs = {rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)}
    command = ("-m", "leanseek", *arguments)
    with tempfile.TemporaryDirectory(prefix="leanseek-") as logs:
        quiet: dict[int, Std] = {rank: Std.NONE if rank == 0 else Std.ALL for rank in range(processes)}
        group = start_processes(
            "leanseek", sys.executable, dict.fromkeys(envs, command), envs, DefaultLogsSpecs(logs, redirects=quiet)
        )
        with _passed_on(group):
            return _wait(group)


@contextlib.contextmanager
def _passed_on(group: PContext) -> Iterator[None]:
    """SIGINT and SIGTERM reach every process of the group."""

    def forward(number: int, frame: object) -> None:
        for pid in group.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(group: PContext) -> int:
    """The exit code of the first rank to fail, 0 if none does."""
    while (result := group.wait(timeout=0)) is None:
        time.sleep(0.1)
    failures = result.failures
    if not failures:
        return 0
    first = min(failures.values(), key=lambda failure: (failure.timestamp, failure.local_rank))
    if first.local_rank and not (0 in failures and failures[0].message == first.message != ""):
        said = Path(result.stderrs[first.local_rank]).read_text(encoding="utf-8", errors="replace").strip()
        how = signal.Signals(-first.exitcode).name if first.exitcode < 0 else f"exit code {first.exitcode}"
        print(f"rank {first.local_rank} failed ({how}){': ' if said else ''}{said}", file=sys.stderr)
    return first.exitcode if first.exitcode > 0 else 1
