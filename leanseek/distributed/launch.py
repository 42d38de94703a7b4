"""Processes of a run: `--nproc N` on this machine, or those that torchrun starts on each node."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from leanseek.distributed import watch
from leanseek.distributed.mesh import build_mesh, check_layout
from leanseek.distributed.ranks import RankPart
from leanseek.distributed.rendezvous import group_store, holder, meet
from leanseek.errors import InputError, Interrupted, RunError
from leanseek.signals import noted
from leanseek.training.config import RunConfig
from leanseek.training.part import Part

TIMEOUT = datetime.timedelta(minutes=20)  # of a collective; `watch` names who holds it up long before
MEETING = 300.0  # seconds for all ranks to come
PATIENCE = 120.0  # seconds of waiting after which a rank says who holds it up; longer than any work between two waits
START = 900.0  # the same before the first step, when a rank may read checkpoints and compile kernels
GRACE = 30.0  # seconds in which the others find out that a rank has failed


def launched() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def join(run: RunConfig) -> Iterator[Part]:
    """This process's part of `run`: a rank's under torchrun or `--nproc`, else everything.

    Raises:
        ConfigError: the layout does not fit the processes.
        RunError: another rank is gone; the line names it.
        SystemExit: this rank failed, and another has said all that it would say.
    """
    if not launched():
        check_layout(run, 1)
        yield Part()
        return
    store = meet(MEETING)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        with watch.watching(store, rank, ranks, PATIENCE, holder(), START):
            check_layout(run, ranks)
            cuda = torch.cuda.is_available() and run.train.device != "cpu"
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            with watch.phase("the start of the group"):
                dist.init_process_group(
                    "nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT
                )
                part = RankPart(run, build_mesh(run, device := "cuda" if cuda else "cpu"), device)
            yield part
    except (InputError, RunError, Interrupted) as error:
        _report(error)
        if _said(store, str(error)):
            raise SystemExit(
                2 if isinstance(error, InputError) else 130 if isinstance(error, Interrupted) else 1
            ) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _said(store: dist.Store, line: str) -> bool:
    """Whether another rank has said it already."""
    try:
        return store.add(f"said/{line}", 1) > 1
    except RuntimeError:  # the store is gone
        return False


def _report(error: Exception) -> None:
    """Say the line where torchrun looks for it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": str(error)}), encoding="utf-8")


def launch(processes: int, saves: bool = True) -> int:
    """Start the command that this process runs again, as that many ranks of a group; returns the exit code.

    The first rank speaks to the user; what others write to stderr is shown if they fail. When one fails the others find
    out whom they lost, and are then stopped. SIGINT and SIGTERM ask the ranks to stop, a second one kills them, as does
    the first where nothing is saved.
    """
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = os.environ | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    with tempfile.TemporaryDirectory(prefix="leanseek-") as folder, noted() as received:
        words = [Path(folder, f"rank-{rank}") for rank in range(processes)]
        ranks = [_start(common, rank, words[rank]) for rank in range(processes)]
        try:
            first = _wait(ranks, group_store(server), received, saves)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        codes = [process.returncode for process in ranks]
        if not any(codes):
            return 0
        said = [line for rank in range(processes) for line in _words(words[rank], codes[rank], whole=rank == first)]
        if not any(code > 0 for code in codes):  # nobody could say anything
            said = ["leanseek: stopped" if received else f"leanseek: rank {first} was ended by {_how(codes[first])}"]
        for line in said:
            print(line, file=sys.stderr)
    if received and not set(codes) & {1, 2}:
        return 130
    return next((code for code in (2, 1, 130) if code in codes), 1)


def _start(common: dict[str, str], rank: int, words: Path) -> subprocess.Popen[bytes]:
    own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    command = [sys.executable, *sys.orig_argv[1:]]
    if rank == 0:
        return subprocess.Popen(command, env=own)
    with words.open("wb") as file:
        return subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)


def _wait(ranks: list[subprocess.Popen[bytes]], store: dist.Store, received: list[int], saves: bool) -> int:
    """Wait until all ranks have ended, or should; the first that failed, if any."""
    asked, failed, until = False, dict[int, None](), float("inf")
    while any(process.poll() is None for process in ranks) and time.monotonic() < until:
        if len(received) > (1 if saves else 0):
            break
        if received and not asked:
            watch.say_stop(store)
            asked = True
        for rank, process in enumerate(ranks):
            if process.poll() and rank not in failed:
                failed[rank] = None
                known = watch.say_ended(store, rank, _how(process.returncode))
                until = min(until, time.monotonic() + (GRACE if known else 1.0))
        time.sleep(0.1)
    return next((rank for rank in failed), 0)


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _words(path: Path, code: int, whole: bool) -> list[str]:
    """What a rank that ended by itself has written: its own lines, and a traceback if it was the first to fail."""
    if code <= 0 or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if whole or line.startswith("leanseek: ")]
