"""What checkpoints need to know of the processes of a run, and how an error of one becomes an error of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from leanseek.errors import InputError, RunError

T = TypeVar("T")


class Ranks:
    """One process alone; runs on several hand in a subclass."""

    rank = 0
    ranks = 1

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank. All ranks call it, from the thread that calls their others."""
        return [value]


class Failure:
    """What went wrong on a rank. Other ranks are told its line, not the error itself."""

    def __init__(self, error: Exception):
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        known = InputError if isinstance(self.error, InputError) else RunError
        return Failure, (known(str(self.error) or type(self.error).__name__),)


def outcome(work: Callable[[], T]) -> T | Failure:
    """What `work` returns or raises."""
    try:
        return work()
    except Exception as error:
        return Failure(error)


def agreed(ranks: Ranks, found: list[T | Failure]) -> list[T]:
    """What all ranks found.

    Raises:
        InputError, RunError: one failed: on every rank the same line, which names the first that did.
    """
    for rank, one in enumerate(found):
        if isinstance(one, Failure):
            if ranks.ranks == 1:
                raise one.error
            known = InputError if isinstance(one.error, InputError) else RunError
            raise known(f"rank {rank}: {one.error}") from one.error
    return cast(list[T], found)
