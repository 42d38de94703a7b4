"""Tests on several ranks: `run_ranks(n, fn)` calls fn(rank) in each of n processes that form a gloo group.

A module's calls share their processes, which fork from a server that has imported torch and leanseek once. What a rank
raises fails the test, and so does a rank that does not answer in time, with the stacks of all that wait. Either way the
processes are killed, and the next call starts new ones.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# `make test` runs these; of the other files, what starts no processes. `make test-dist` runs all.
QUICK = ("test_exchange.py", "test_launch.py", "test_layouts.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        here = item.path.parent == Path(__file__).parent
        if here and item.path.name not in QUICK and item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.slow)


# Calls that ranks serve before new ones take their place: each leaves process groups, whose threads poll for ever, and
# FSDP keeps what belongs to them.
CALLS = 8

ROOT = str(Path(__file__).parent.parent.parent)
if ROOT not in sys.path:
    sys.path.append(ROOT)  # a rank imports the test's function by its module's name, tests.distributed.…

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed", "pytest", "hypothesis", "leanseek.training", "leanseek.native"])


class Ranks:
    """n processes in a gloo group, one thread each, that run what they are sent."""

    def __init__(self, n: int, folder: Path):
        self.folder, self.calls = folder, 0
        self.ends, others = zip(*(PROCESSES.Pipe() for _ in range(n)), strict=True)
        self.processes = [
            PROCESSES.Process(target=_serve, args=(rank, n, str(folder), other), daemon=True)
            for rank, other in enumerate(others)
        ]
        for process, other in zip(self.processes, others, strict=True):
            process.start()
            other.close()
        self.run((_here, (), {}), timeout=120)

    def run(self, call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], timeout: float) -> list[Any]:
        """What a function, called with the rank, arguments and options, returns on each rank. What cannot run in time
        or raises is an AssertionError."""
        self.calls += 1
        for end in self.ends:
            end.send_bytes(pickle.dumps(call))
        found: dict[int, Any] = {}
        failed: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(found) + len(failed) < len(self.ends):
            waiting = {end: r for r, end in enumerate(self.ends) if r not in found and r not in failed}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            for end in ready:
                assert isinstance(end, Connection)
                rank = waiting[end]
                try:
                    done, answer = pickle.loads(end.recv_bytes())
                except (EOFError, ConnectionResetError):
                    done, answer = False, "the process ended"
                (found if done else failed)[rank] = answer
            if failed:
                deadline = min(deadline, time.monotonic() + 2)  # the others may wait for one that failed
            if not ready:
                failed |= {r: f"no answer in {timeout} s\n{self._stack(r)}" for r in waiting.values() if not failed}
                break
        if failed:
            self.kill()
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failed.items())))
        return [found[rank] for rank in range(len(self.ends))]

    def _stack(self, rank: int) -> str:
        pid = self.processes[rank].pid
        if pid is None or not self.processes[rank].is_alive():
            return "the process ended"
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        return (self.folder / f"{rank}.stack").read_text(encoding="utf-8")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process, end in zip(self.processes, self.ends, strict=True):
            process.join()
            end.close()


def _here(rank: int) -> int:
    return rank


def _serve(rank: int, n: int, folder: str, end: Connection) -> None:
    torch.set_num_threads(1)
    stacks = Path(folder, f"{rank}.stack").open("w", encoding="utf-8")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, stacks)
    # a rank whose partner hangs is killed by the test before gloo gives up
    limit = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", n), rank=rank, world_size=n, timeout=limit)
    while True:
        try:
            call = end.recv_bytes()
        except EOFError:  # the test's process has gone
            return
        try:
            function, arguments, options = pickle.loads(call)
            torch.manual_seed(0)
            answer = True, function(rank, *arguments, **options)
        except BaseException:
            answer = False, traceback.format_exc()
        end.send_bytes(pickle.dumps(answer))


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """run_ranks(n, fn, *arguments, timeout=60, **options): what fn(rank, *arguments, **options) returned on each rank.

    fn is a function of the test module (it is sent by name); arguments and results are tensors and plain data.
    """
    groups: dict[int, Ranks] = {}

    def run(n: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60, **options: Any) -> list[Any]:
        if n in groups and (groups[n].calls >= CALLS or not all(p.is_alive() for p in groups[n].processes)):
            groups.pop(n).kill()
        if n not in groups:
            groups[n] = Ranks(n, tmp_path_factory.mktemp("ranks"))
        return groups[n].run((function, arguments, options), timeout)

    yield run
    for group in groups.values():
        group.kill()
