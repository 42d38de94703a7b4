"""What a group of processes can do: time and bandwidth of the collectives that training uses, and who is slow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from leanseek.distributed import watch
from leanseek.distributed.collectives import all_gather, reduce_scatter

SIZES = (2**12, 2**20, 2**24)  # bytes of the largest buffer of a rank; the first shows the latency
SECONDS = 0.2  # for one collective of one size
SLOW = 2.0  # times the median from which a rank is called slow
SIDE = {"cpu": 384, "cuda": 4096}  # of the square products that a rank's own speed is measured with


class Figure(NamedTuple):
    """One collective of one size."""

    name: str
    size: int  # bytes of the largest buffer of a rank
    seconds: float  # of a call, on the slowest rank
    rate: float  # bytes that a rank must send to others at least, per second


class Group(NamedTuple):
    """What was measured, the same on every rank."""

    figures: list[Figure]
    products: list[float]  # of each rank: seconds of its own product of two matrices
    links: list[float]  # of each rank: seconds of 4 KiB there and back, over the better of the links to its neighbours


Call = Callable[[], object]


def measure(device: torch.device) -> Group:
    """Measures the default group; every rank calls it. Each wait is a phase of `watch`."""
    figures = []
    for size in SIZES:
        for name, (call, sent) in _collectives(size, device).items():
            with watch.phase(f"{name} of {size:,} bytes"):
                seconds = float(_gathered(_seconds(call, device), device).max())
            figures.append(Figure(name, size, seconds, sent / seconds))
    product = own_product(device)
    with watch.phase("the exchange of figures"):
        products = _gathered(product, device).tolist()
    with watch.phase("the links between neighbours"):
        links = _links(device)
    return Group(figures, products, links)


def slow(group: Group) -> list[str]:
    """A line for each rank that is much slower than the median."""
    lines = []
    for what, times in (("its own products take", group.products), ("messages to its neighbours take", group.links)):
        median = statistics.median(times)
        lines += [
            f"rank {rank} is slow: {what} {seconds / median:.1f} times the median"
            for rank, seconds in enumerate(times)
            if seconds > SLOW * median
        ]
    return lines


def own_product(device: torch.device) -> float:
    """Seconds of one product in this process, the best of a few: what it does without the others."""
    side = SIDE[device.type]
    a = torch.randn(side, side, device=device)
    return min(_timed(lambda: a @ a, device) for _ in range(8))


def _collectives(size: int, device: torch.device) -> dict[str, tuple[Call, float]]:
    """Each collective as a call, with the bytes that a rank must send to others at least."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share = max(1, size // 4 // ranks)  # FP32, as gradients are summed
    whole, part = torch.zeros(share * ranks, device=device), torch.zeros(share, device=device)
    others = 4 * share * (ranks - 1)
    found: dict[str, tuple[Call, float]] = {
        "all_reduce": (lambda: dist.all_reduce(whole), 2 * others),
        "reduce_scatter": (lambda: reduce_scatter(part, whole), others),
        "all_gather": (lambda: all_gather(whole, part), others),
    }
    # BF16 rows as in the experts' dispatch: another number for each pair of ranks, some of them none
    unit = max(1, size // 2 // (2 * ranks))
    splits = [[unit * ((a + b) % 3) for b in range(ranks)] for a in range(ranks)]
    outward, inward = splits[rank], [row[rank] for row in splits]
    rows = torch.zeros(sum(outward), dtype=torch.bfloat16, device=device)
    room = torch.zeros(sum(inward), dtype=torch.bfloat16, device=device)
    most = 2 * max(sum(row) - row[a] for a, row in enumerate(splits))
    found["all_to_all"] = (lambda: dist.all_to_all_single(room, rows, inward, outward), most)
    if ranks > 1:
        message = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        buffer = torch.zeros_like(message)

        def ring() -> None:
            ops = [
                dist.P2POp(dist.isend, message, (rank + 1) % ranks),
                dist.P2POp(dist.irecv, buffer, (rank - 1) % ranks),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        found["send_recv"] = (ring, size)
    return found


def _links(device: torch.device) -> list[float]:
    """Of each rank: seconds of a small message there and back, over its better link. A slow rank slows down both."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pairs = [(a, (a + 1) % ranks) for a in range(ranks if ranks > 2 else ranks - 1)]
    own = []
    for turn in range(3):  # in a turn, no rank is in two pairs
        dist.barrier()
        for a, b in pairs:
            if rank in (a, b) and turn == (2 if a == ranks - 1 and ranks % 2 else a % 2):
                own.append(_ping(b if rank == a else a, rank == a, device))
    return _gathered(min(own, default=0.0), device).tolist()


def _ping(peer: int, first: bool, device: torch.device) -> float:
    message = torch.zeros(SIZES[0], dtype=torch.uint8, device=device)

    def there_and_back() -> None:
        for sends in (first, not first):
            dist.send(message, peer) if sends else dist.recv(message, peer)

    return min(_timed(there_and_back, device) for _ in range(10))


def _seconds(call: Call, device: torch.device) -> float:
    """Seconds of a call, mean over as many as fit into `SECONDS`; every rank makes the same number of calls."""
    call()
    first = float(_gathered(_timed(call, device), device).max())
    calls = max(2, min(100, int(SECONDS / first)))
    dist.barrier()

    def several() -> None:
        for _ in range(calls):
            call()

    return _timed(several, device) / calls


def _timed(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _gathered(figure: float, device: torch.device) -> Tensor:
    """The figures of all ranks [ranks], on every rank."""
    out = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    all_gather(out, torch.tensor([figure], dtype=torch.float64, device=device))
    return out.cpu()
