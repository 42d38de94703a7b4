"""Runs untrusted programs (chat templates, trial compilations of grammars) in processes of their own.

A program that takes too long, takes too much memory or dies causes an error for its caller and affects nobody else.
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

SLOW_S = 0.25  # an answer that takes longer continues at low priority
MOST_SLOW = 8  # slow answers at once
LANES = MOST_SLOW + 2  # answers at once, with room for quick ones beside the slow ones
_KEPT = 2  # idle processes to keep


class Overtaxed(Exception):
    """The program took too long or too much memory, or it died."""


class Crowded(Exception):
    """This answer is slow, and too many slow ones are running already. The caller may ask again later."""


class Confined:
    """A script that answers lines of JSON, with one process for each concurrent question.

    An answer that takes longer than `SLOW_S` continues at the lowest priority, and at most `MOST_SLOW` of these run at
    once, so quick answers never wait for slow ones. All methods are thread-safe.

    Args:
        script: path of a Python file
        opening: the first line sent to each process
        seconds: time limit of an answer

    Raises:
        Overtaxed: the process failed on the opening.
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
        weakref.finalize(self, _end_all, self._all)  # runs at the interpreter's exit too
        process, self.opened = self._start()  # a process's answer to the opening
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
            with self._lock:  # a slow process is not reused: it keeps its low priority
                kept = answer is not None and not watch.slow and not self._closed and len(self._idle) < _KEPT
                if kept:
                    self._idle.append(process)
            if not kept:
                self._end(process)
        if answer is None:
            raise Crowded() if watch.crowded else Overtaxed()
        return answer

    def close(self) -> None:
        """End all processes; callers that wait for an answer get Overtaxed."""
        with self._lock:
            self._closed = True
            processes, self._idle = list(self._all), []
        for process in processes:
            self._end(process)

    def _start(self) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """Start a process; returns it and its answer to the opening."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches only the server, which still finishes its requests
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
    """Times a process's answer: lowers its priority after SLOW_S, and kills it at the time limit."""

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
            with suppress(OSError):  # the process has just died
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)
            self._timer = threading.Timer(max(0.0, self._pool.seconds - SLOW_S), self._process.kill)
            self._timer.start()

    def end(self) -> None:
        with self._pool._lock:
            self._ended = True
            self._timer.cancel()
            self._pool._slow -= self.slow


def _converse(process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
    """The answer to a line; None if the process has died."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline()
    except (OSError, ValueError):  # the pipe is broken or closed
        return None
    return dict(json.loads(answer)) if answer.endswith("\n") else None
