"""What checkpoints need of the processes of a run, and how an error of one becomes the same error of all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from leanseek.errors import InputError, RunError


class Ranks:
    """One process alone. Runs on several hand in a subclass, whose methods all ranks call in the same order."""

    rank, ranks = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks: plain data, or a tensor on the CPU."""
        return [value]


class Outcome(NamedTuple):
    """What a rank's work came to."""

    value: Any = None
    error: Exception | None = None


def outcome(work: Callable[[], Any]) -> Outcome:
    """What `work` returns or raises."""
    try:
        return Outcome(work())
    except Exception as error:
        return Outcome(error=error)


def agreed(ranks: Ranks, own: Outcome | None) -> list[Any] | None:
    """What the work of every rank came to; None while one is still at it, whose `own` is None.

    Raises:
        InputError, RunError: one failed: on every rank the same line, which names the first that did.
    """
    line = own and own.error and (str(own.error) or type(own.error).__name__)
    told = ranks.gather(own and [own.value, line, isinstance(own.error, InputError)])
    if None in told:
        return None
    for rank, (_, line, by_user) in enumerate(told):
        if line is not None:
            cause = own.error if own and rank == ranks.rank else None
            if ranks.ranks == 1 and cause is not None:
                raise cause
            raise (InputError if by_user else RunError)(f"rank {rank}: {line}") from cause
    return [value for value, *_ in told]


@contextlib.contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """What follows the block runs on all ranks or on none.

    Raises:
        InputError, RunError: as `agreed`.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    agreed(ranks, Outcome(error=failed))
