"""The harness of these tests: ranks meet, failures and hangs fail in time, and the next call works again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.distributed
Run = Callable[..., list[Any]]


def total(rank: int, start: torch.Tensor) -> tuple[torch.Tensor, int]:
    found = start + rank
    dist.all_reduce(found)
    return found, os.getpid()


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


def hang_on_one(rank: int) -> None:
    if rank == 0:
        time.sleep(600)


def die_on_one(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def test_calls_share_processes(run_ranks: Run) -> None:
    first, second = (run_ranks(2, total, torch.ones(3)) for _ in range(2))
    assert all(torch.equal(found, torch.full((3,), 3.0)) for found, _ in first + second)
    assert [pid for _, pid in first] == [pid for _, pid in second]
    assert len({pid for _, pid in first} | {os.getpid()}) == 3


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (fail_on_one, "rank 1: .*rank one has had enough"),
        (hang_on_one, r"rank 0: no answer in 1 s\n(.|\n)*hang_on_one"),
        (die_on_one, "rank 1: the process ended"),
    ],
)
def test_a_rank_that_fails_fails_the_test(run_ranks: Run, function: Callable[..., None], said: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        run_ranks(2, function, timeout=1)  # well before gloo's ten minutes
    assert len(run_ranks(2, total, torch.ones(1))) == 2
