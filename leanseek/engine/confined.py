"""Runs untrusted programs (chat templates, trial compilations of grammars) in processes of their own.

A program that takes too long, takes too much memory or dies causes an error for its caller and affects nobody else.
"""

from __future__ import annotations

import json
import os
import signal
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


class Child:
    """A script in a process group of its own that answers lines of JSON, one at a time.

    errors: where its standard error goes, as subprocess has it
    """

    def __init__(self, script: str, errors: int | None = subprocess.DEVNULL):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-P", script],
            stdin=pipe,
            stdout=pipe,
            stderr=errors,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches only the parent, which still finishes its work
        )
        self.pid = self._process.pid

    def ask(self, line: str) -> dict[str, Any] | None:
        """The answer to a line; None if the process has died."""
        process = self._process
        assert process.stdin and process.stdout
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # the pipe is broken or closed
            return None
        return dict(json.loads(answer)) if answer.endswith("\n") else None

    def kill(self) -> None:
        """End it and whatever it has started."""
        if self._process.returncode is None:  # not waited for, so nobody else has its number
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill it and wait for its end."""
        self.kill()
        self._process.wait()


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
        self._script = script
        self._opening = json.dumps(opening) + "\n"
        self.seconds = seconds
        self._lock = threading.Lock()
        self._idle: list[Child] = []
        self._all: set[Child] = set()
        self._slow = 0
        self._closed = False
        weakref.finalize(self, _end_all, self._all)  # runs at the interpreter's exit too
        child, self.opened = self._start()  # a process's answer to the opening
        self._idle.append(child)

    def ask(self, question: Any) -> dict[str, Any]:
        """Raises Overtaxed, Crowded."""
        line = json.dumps(question) + "\n"
        with self._lock:
            child = self._idle.pop() if self._idle else None
        child = child or self._start()[0]
        watch = _Watch(self, child)
        answer = None
        try:
            answer = child.ask(line)
        finally:
            watch.end()
            with self._lock:  # a slow process is not reused: it keeps its low priority
                kept = answer is not None and not watch.slow and not self._closed and len(self._idle) < _KEPT
                if kept:
                    self._idle.append(child)
            if not kept:
                self._end(child)
        if answer is None:
            raise Crowded() if watch.crowded else Overtaxed()
        return answer

    def close(self) -> None:
        """End all processes; callers that wait for an answer get Overtaxed."""
        with self._lock:
            self._closed = True
            children, self._idle = list(self._all), []
        for child in children:
            self._end(child)

    def _start(self) -> tuple[Child, dict[str, Any]]:
        """Start a process; returns it and its answer to the opening."""
        child = Child(self._script)
        with self._lock:
            self._all.add(child)
        deadline = threading.Timer(self.seconds, child.kill)
        deadline.start()
        answer = child.ask(self._opening)
        deadline.cancel()
        if answer is None:
            self._end(child)
            raise Overtaxed()
        return child, answer

    def _end(self, child: Child) -> None:
        child.end()
        with self._lock:
            self._all.discard(child)


def _end_all(children: set[Child]) -> None:
    for child in children:
        child.end()


class _Watch:
    """Times a process's answer: lowers its priority after SLOW_S, and kills it at the time limit."""

    def __init__(self, pool: Confined, child: Child):
        self._pool = pool
        self._child = child
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
                self._child.kill()
                return
            with suppress(OSError):  # the process has just died
                os.setpriority(os.PRIO_PROCESS, self._child.pid, 19)
            self._timer = threading.Timer(max(0.0, self._pool.seconds - SLOW_S), self._child.kill)
            self._timer.start()

    def end(self) -> None:
        with self._pool._lock:
            self._ended = True
            self._timer.cancel()
            self._pool._slow -= self.slow
