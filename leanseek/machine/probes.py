"""Measured limits that speeds are quoted against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

PROBE_SECONDS = 1.0


def gemm_rate(
    dtype: torch.dtype, device: torch.device | str, size: int | None = None, seconds: float = PROBE_SECONDS
) -> float:
    """The best FLOP/s measured for square matrix products within about `seconds`.

    The side doubles from 128 up to `size` (2048; 8192 on a GPU) while time is left, so a dtype that is emulated at a
    thousandth of the speed is measured on small products instead of taking minutes.
    """
    device = torch.device(device)
    size, side, best = size or (8192 if device.type == "cuda" else 2048), 128, 0.0
    end = time.perf_counter() + seconds
    while True:
        a = torch.randn(side, side, device=device).to(dtype)  # constants draw less power and would run faster
        took = min(call_seconds(lambda a=a: a @ a, device, 5, end))  # type: ignore[misc]
        best = max(best, 2 * side**3 / took)
        if 2 * side > size or time.perf_counter() + 2 * 8 * took > end:  # twice as wide, at least two of them
            return best
        side *= 2


def call_seconds(work: Callable[[], object], device: torch.device, repeats: int, end: float = math.inf) -> list[float]:
    """Seconds of each of `repeats` calls after one warm-up call; at least one, fewer if the time `end` comes first."""
    times: list[float] = []
    while len(times) <= repeats and (len(times) < 2 or time.perf_counter() < end):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[1:]
