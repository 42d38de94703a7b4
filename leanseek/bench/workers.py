"""Two programs timed in turn: each side is a process that stays alive, works when told to and reports what it took.

A worker reads a line with a number of rounds from stdin and answers with a JSON line. Sides that alternate see the same
machine, also when its speed drifts.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_INSIDE = Path(__file__).parent / "peers"  # the peers' scripts, once installed
PEERS = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2] / "benchmarks" / "peers"


def say(line: str) -> None:
    """Progress, on stderr: what a measurement does now."""
    print(line, file=sys.stderr, flush=True)


class Worker:
    """A started worker. `error` is set, in one line, when it could not start."""

    def __init__(self, command: list[str]):
        # not a pipe: it would fill up unread
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=self._said,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self.ready = self._read()

    def work(self, rounds: int) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(f"{rounds}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it and what it started: vLLM's own workers hold gigabytes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._said.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._said.seek(0)
        last = (self._said.read().strip().splitlines() or ["no message"])[-1]
        return {"error": last}


def serve(ready: dict[str, Any], work: Callable[[int], dict[str, Any]]) -> None:
    """The worker's side: announce `ready`, then answer every line with `work(rounds)` and the peak memory so far, the
    process's unless `work` knows better."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        found = work(int(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"peak_memory_bytes": peak} | found), flush=True)


def peer_command(name: str, *arguments: str) -> list[str]:
    """How to start a peer's script."""
    return [sys.executable, str(PEERS / f"{name}.py"), *arguments]
