"""A forward and a backward that take turns, so that one computes while rows of the other travel (3.2.1, figure 4).

Each runs until it would wait for an exchange and then gives way to the other. So, for a layer of both, in this order:

    backward starts combine         forward: attention, gate, starts dispatch
    backward: experts, starts dispatch, the experts' weight gradients
                                    forward: experts, starts combine
    backward: attention, starts the next layer's combine, attention's weight gradients

which is the paper's, with each exchange started as soon as its rows are there. Backward stays as autograd runs it: it
gives way from within the exchanges' own functions, so no graph is cut. The forward has a thread of its own, but one of
the two runs at a time, and which one does not depend on time: all ranks enter their exchanges in one order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from leanseek.ops import WeightGradients, deferred

T = TypeVar("T")
FORWARD, BACKWARD = 0, 1

# Not a ContextVar: on CUDA, backward runs in a thread of autograd's own.
_RUNNING: list[Turns] = []


def give_way() -> None:
    """Called before a wait for an exchange: the other of a pair runs until it would wait, too."""
    if _RUNNING:
        _RUNNING[0].switch()


def started() -> None:
    """Called when backward has started an exchange: there is time for the weight gradients put off so far."""
    if _RUNNING:
        _RUNNING[0].later.compute()


class Turns:
    """One pair. `later` takes the weight gradients of its backward; none is left afterwards."""

    def __init__(self, later: WeightGradients):
        self.later = later
        self._gates = threading.Semaphore(0), threading.Semaphore(0)
        self._turn, self._over, self._failed = BACKWARD, [False, False], False

    def run(self, forward: Callable[[], T], backward: Callable[[], T], thread: ThreadPoolExecutor) -> tuple[T, T]:
        """The results of both. Backward begins, and lasts until its first wait."""
        assert not _RUNNING
        _RUNNING.append(self)
        try:
            found = thread.submit(self._forward, forward, torch.get_num_threads(), _stream())
            try:
                back = backward()
                self.later.compute()
            except BaseException:
                self._failed = True
                raise
            finally:
                self._end(BACKWARD)
                found.exception()  # wait for it
            return found.result(), back
        finally:
            _RUNNING.pop()

    def _forward(self, forward: Callable[[], T], threads: int, stream: torch.cuda.Stream | None) -> T:
        self._gates[FORWARD].acquire()
        try:
            self._check()
            torch.set_num_threads(threads)  # OpenMP's number is a thread's own
            with torch.cuda.stream(stream):
                return forward()
        finally:
            self._end(FORWARD)

    def switch(self) -> None:
        """Let the other run, if it has not come to its end, until it gives way or ends."""
        own = self._turn
        if self._over[1 - own]:
            return
        stores = deferred.set_aside()
        self._turn = 1 - own
        self._gates[1 - own].release()
        self._gates[own].acquire()
        deferred.take_up(stores)
        self._check()

    def _check(self) -> None:
        if self._failed:
            raise RuntimeError("the backward of a pair failed, so its forward ends")

    def _end(self, own: int) -> None:
        self._over[own] = True
        if not self._over[1 - own]:
            self._turn = 1 - own
            self._gates[1 - own].release()


def _stream() -> torch.cuda.Stream | None:
    return torch.cuda.current_stream() if torch.cuda.is_available() else None
