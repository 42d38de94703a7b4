"""How the processes of a group find each other, and who is missing if they do not."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from leanseek.distributed.watch import ranks_in_words
from leanseek.errors import InputError, RunError


def meet(timeout: float) -> dist.Store:
    """The store of the group that a launcher describes in the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Raises:
        InputError: the environment describes no group.
        RunError: after `timeout` seconds not all ranks are there; it names the missing ones.
    """
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise InputError(
            f"the environment describes no group of processes ({error}): start them with torchrun"
        ) from None
    try:
        server = dist.TCPStore(
            host, port, world,
            is_master=rank == 0 and holder() == "rank 0",
            timeout=timedelta(seconds=timeout), multi_tenant=True, wait_for_workers=False,
        )  # fmt: skip
        store = group_store(server)
        store.set(f"here/{rank}", socket.gethostname())
        missing, end = list(range(world)), time.monotonic() + timeout
        while missing := [r for r in missing if not store.check([f"here/{r}"])]:
            if time.monotonic() > end:
                time.sleep(float(rank == 0))  # whose store tells the others the same
                raise RunError(f"{ranks_in_words(missing)} of {world} did not come within {timeout:.0f} s")
            time.sleep(0.05)
        return store
    except dist.DistError:
        raise RunError(f"rank {rank}: {holder()} does not answer at {host}:{port} within {timeout:.0f} s") from None


def group_store(server: dist.Store) -> dist.Store:
    """This attempt's part of a launcher's store: torchrun keeps it when it starts all ranks again."""
    return dist.PrefixStore(f"leanseek/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)


def holder() -> str:
    """Who holds the store, in words."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def hosts(store: dist.Store, world: int) -> list[str]:
    """The host of each rank of a group that has met."""
    return [store.get(f"here/{rank}").decode() for rank in range(world)]
