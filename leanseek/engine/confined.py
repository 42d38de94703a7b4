"""Other people's programs, run in processes of their own: chat templates, grammars on trial.

A program that takes too long, takes too much memory or dies costs its caller an error and nobody else anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any

SLOW_S = 0.25  # an answer that takes longer gives way to all others
MOST_SLOW = 8  # such answers at once
LANES = MOST_SLOW + 2  # answers at once that still leave room for quick ones
_KEPT = 2  # idle processes


class Overtaxed(Exception):
    """The program took too long or too much memory, or it died."""


class Crowded(Exception):
    """So many slow answers are being worked out that this one, slow too, was given up; it may be asked for again."""


class Confined:
    """A script that answers lines of JSON, in as many processes as are asked at once.

    An answer that takes longer than `SLOW_S` goes on at the lowest priority, and only `MOST_SLOW` of those at once:
    quick answers never wait for slow ones. All methods may be called from any thread.

    Args:
        script: path of a Python file
        opening: what each process is told first
        seconds: of an answer, at most

    Raises:
        Overtaxed: no process would take the opening.
    """

    def __init__(self, script: str, opening: Any, seconds: float):
        self._command = [sys.executable, "-P", script]
        self._opening = json.dumps(opening) + "\n"
        self.seconds = seconds
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []
        self._all: set[subprocess.Popen[str]] = set()
        self._slow = 0
        self._closed = False
        weakref.finalize(self, _end_all, self._all)  # also at the interpreter's exit
        process, self.opened = self._start()  # what a process answers to the opening
        self._idle.append(process)

    def ask(self, question: Any) -> dict[str, Any]:
        """Raises Overtaxed, Crowded."""
        line = json.dumps(question) + "\n"
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or self._start()[0]
        watch = _Watch(self, process)
        answer = None
        try:
            answer = _converse(process, line)
        finally:
            watch.end()
            with self._lock:  # a slow one keeps its low priority: it is of no more use
                kept = answer is not None and not watch.slow and not self._closed and len(self._idle) < _KEPT
                if kept:
                    self._idle.append(process)
            if not kept:
                self._end(process)
        if answer is None:
            raise Crowded() if watch.crowded else Overtaxed()
        return answer

    def close(self) -> None:
        """End all processes: whoever waits for an answer is told Overtaxed."""
        with self._lock:
            self._closed = True
            processes, self._idle = list(self._all), []
        for process in processes:
            self._end(process)

    def _start(self) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """A process, and its answer to the opening."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the server, which still answers what runs
        )
        with self._lock:
            self._all.add(process)
        deadline = threading.Timer(self.seconds, process.kill)
        deadline.start()
        answer = _converse(process, self._opening)
        deadline.cancel()
        if answer is None:
            self._end(process)
            raise Overtaxed()
        return process, answer

    def _end(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()
        with self._lock:
            self._all.discard(process)


def _end_all(processes: set[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


class _Watch:
    """Looks on while a process works out an answer: first it is quick, then slow, then ended."""

    def __init__(self, pool: Confined, process: subprocess.Popen[str]):
        self._pool = pool
        self._process = process
        self._ended = False
        self.slow = self.crowded = False
        self._timer = threading.Timer(min(SLOW_S, pool.seconds), self._turn_slow)
        self._timer.start()

    def _turn_slow(self) -> None:
        with self._pool._lock:
            if self._ended:
                return
            self.slow = True
            self._pool._slow += 1
            if self._pool._slow > MOST_SLOW:
                self.crowded = True
                self._process.kill()
                return
            with suppress(OSError):  # it has just died
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)
            self._timer = threading.Timer(max(0.0, self._pool.seconds - SLOW_S), self._process.kill)
            self._timer.start()

    def end(self) -> None:
        with self._pool._lock:
            self._ended = True
            self._timer.cancel()
            self._pool._slow -= self.slow


def _converse(process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
    """The answer to a line; None from a process that has died."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline()
    except (OSError, ValueError):  # the pipe is broken or closed
        return None
    return dict(json.loads(answer)) if answer.endswith("\n") else None
