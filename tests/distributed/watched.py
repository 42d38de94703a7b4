"""Groups of three ranks in which one holds up the others: a script, run by test_watch.py.

Prints a JSON object: by case, exit code and words of each rank. All cases run at once, since they only wait.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from leanseek.cli import doctor
from leanseek.distributed import probes, watch
from leanseek.errors import RunError

WORLD, TIMEOUT, BEAT = 3, 3.0, 0.5
HELD_UP = 60  # seconds: longer than any test
LIMIT = 45  # seconds after which a rank is killed: a failed test, not a hung one


def noted() -> None:
    """Waits until what this rank does now is in its published note."""
    assert watch._board.watcher is not None
    now = [*watch._board.now[:2], watch._board.step]
    while json.loads(watch._board.watcher.notes.get(str(dist.get_rank())))[1:4] != now:
        time.sleep(BEAT / 5)


def from_here() -> None:
    """From here on waits are short. All ranks are here: until then a busy machine may take its time."""
    assert watch._board.watcher is not None
    dist.barrier()
    watch._board.watcher.timeout = watch._board.watcher.start = TIMEOUT


def sleep() -> None:
    time.sleep(HELD_UP)


def stop() -> None:
    noted()
    os.kill(os.getpid(), signal.SIGSTOP)


def leave() -> None:
    noted()
    os._exit(3)


def fail() -> None:
    raise ValueError("no such shard")


def wait_elsewhere() -> None:
    with watch.phase("combine", layer=7):
        sleep()


FAULTS: dict[str, tuple[int, Callable[[], None]]] = {
    "sleeps": (1, sleep),
    "stopped": (2, stop),
    "holder stopped": (0, stop),
    "exits": (1, leave),
    "raises": (1, fail),
    "elsewhere": (1, wait_elsewhere),
    "doctor": (1, stop),  # in its own products
}


def work(case: str, rank: int, port: int) -> None:
    """Two steps that pass, then one in which a rank does something else than the others."""
    watch.BEAT = BEAT
    if case == "doctor":
        examine(rank, port)
        return
    store = dist.TCPStore("127.0.0.1", port, WORLD, is_master=rank == 0, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    culprit, fault = FAULTS[case]
    try:
        with watch.watching(store, rank, WORLD, HELD_UP):
            for step in (10, 11, 12):
                watch.step(step)
                with watch.phase("dispatch", layer=3):
                    dist.barrier()
                if step == 12:
                    from_here()
                    if rank == culprit:
                        fault()
                with watch.phase("dispatch", layer=7):
                    dist.barrier()
    except RunError as error:
        print(f"leanseek: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except ValueError:
        sleep()  # its process lives on for a while


def examine(rank: int, port: int) -> None:
    """`leanseek doctor` for a group."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    probes.SIZES, probes.SECONDS = (2**12,), 0.01

    def own_product(device: object) -> float:
        from_here()
        if rank == FAULTS["doctor"][0]:
            stop()
        return 1.0

    probes.own_product = own_product
    doctor.examine_group(HELD_UP)


def start(case: str, rank: int, port: int, words: Path) -> int:
    process = os.fork()
    if not process:
        handle = os.open(words, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            work(case, rank, port)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(4)
    return process


def ended(process: int, until: float) -> int | None:
    """The exit code of a child; None if it had to be killed."""
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for case in FAULTS:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            running[case] = [start(case, rank, port, Path(folder, f"{case}-{rank}")) for rank in range(WORLD)]
        end = time.monotonic() + LIMIT
        for case, processes in running.items():
            codes = {}
            for rank in sorted(range(WORLD), key=lambda rank: rank == FAULTS[case][0]):
                alone = rank == FAULTS[case][0] and case != "elsewhere"  # the one at fault does not end by itself
                codes[rank] = ended(processes[rank], 0.0 if alone else end)
            words = [Path(folder, f"{case}-{rank}").read_text("utf-8") for rank in range(WORLD)]
            found[case] = [(codes[rank], words[rank]) for rank in range(WORLD)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
