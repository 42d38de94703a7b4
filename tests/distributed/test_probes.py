"""A group is measured as training uses it, and whoever is slow or missing is named."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from leanseek import InputError
from leanseek.cli import doctor
from leanseek.distributed import probes
from leanseek.distributed.probes import Figure, Group
from leanseek.distributed.rendezvous import hosts, meet
from leanseek.errors import RunError

OPS = ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send_recv"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def measured(rank: int) -> dict[str, Any]:
    probes.SIZES, probes.SECONDS = (2**12, 2**16), 0.01
    if rank == 1:
        probes.own_product = lambda device: 0.5
    return probes.measure(torch.device("cpu"))._asdict()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_learns_the_same_figures(run_ranks: Callable[..., list[Any]], ranks: int) -> None:
    found = run_ranks(ranks, measured)
    assert all(f == found[0] for f in found)
    group = Group(**found[0])
    assert sorted((f.name, f.size) for f in group.figures) == sorted(
        (op, size) for op in OPS for size in (2**12, 2**16)
    )
    assert all(f.seconds > 0 and f.rate > 0 for f in group.figures)
    assert len(group.products) == len(group.links) == ranks and min(group.links) > 0
    assert group.products[1] == 0.5
    assert any(line.startswith("rank 1 is slow: its own products take") for line in probes.slow(group)) == (ranks > 2)


stores = []  # of a rank: the first one's serve the others for as long as it keeps them


def came(rank: int, port: int, late: int) -> str | list[str]:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        if rank == late:
            return []
        stores.append(meet(3.0))
        return hosts(stores[-1], 3)
    except RunError as error:
        return str(error)


@pytest.mark.slow  # it waits for three time-outs
@pytest.mark.distributed
def test_a_rank_that_does_not_come_is_named(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(3, came, free_port(), None) == [[socket.gethostname()] * 3] * 3
    assert run_ranks(3, came, free_port(), 2)[:2] == ["rank 2 of 3 did not come within 3 s"] * 2
    port = free_port()
    assert run_ranks(3, came, port, 0)[1:] == [
        f"rank {rank}: rank 0 does not answer at 127.0.0.1:{port} within 3 s" for rank in (1, 2)
    ]


def examined(rank: int, port: int) -> dict[str, Any] | None:
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return doctor.examine_group(20.0)


@pytest.mark.distributed
def test_doctor_examines_a_group_of_its_own(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(2, examined, free_port())
    assert second is None and first["ranks"] == 2 and first["hosts"] == [socket.gethostname()] * 2
    text = doctor.group_text(first)
    assert all(f"\n{op}" in text for op in OPS) and "not what GPUs reach" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_slow_rank_is_named() -> None:
    figures = [Figure("all_reduce", 4096, 1e-3, 1e6)]
    assert probes.slow(Group(figures, [1.0, 1.1, 0.9, 1.9], [1.0] * 4)) == []
    assert probes.slow(Group(figures, [1.0, 1.0, 3.0, 1.0], [1.0, 1.0, 1.0, 4.0])) == [
        "rank 2 is slow: its own products take 3.0 times the median",
        "rank 3 is slow: messages to its neighbours take 4.0 times the median",
    ]


def test_outside_a_group_it_is_said_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="torchrun"):
        meet(1.0)
