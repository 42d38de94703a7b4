"""What the machine is and what it can do, measured beside each benchmark."""

from __future__ import annotations

import platform
import statistics
from typing import Any

import torch

from leanseek import native
from leanseek.bench.workers import say
from leanseek.machine.device import default_device, preferred_dtype
from leanseek.machine.memory import empty
from leanseek.machine.probes import call_seconds, gemm_rate
from leanseek.native.library import kernel

read_memory = kernel("read_memory", "pnp")


def machine() -> dict[str, Any]:
    """What this machine is and what it can do, measured now."""
    device = default_device()
    say("measuring the machine's limits")
    float32, bfloat16 = (gemm_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16))
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "preferred_dtype": str(preferred_dtype(device)).removeprefix("torch."),
        "gemm_flops_float32": float32,
        "gemm_flops_bfloat16": bfloat16,
        "emulated": ["bfloat16"] if bfloat16 < float32 else [],  # by torch, and slower than what it stands for
        "read_bytes_per_second": read_bandwidth(device),
    }


def fastest_dtype(limits: dict[str, Any]) -> str:
    """The dtype that `machine()` found matrix products to be fastest in."""
    return "float32" if limits["emulated"] else "bfloat16"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def read_bandwidth(device: torch.device | str, size: int | None = None, repeats: int = 5) -> float:
    """Measured bytes/s of reading `size` bytes (256 MiB, on a GPU 4 GiB) with all threads, the median of `repeats`."""
    size = size or (2**32 if torch.device(device).type == "cuda" else 2**28)
    a = empty((size // 4,), torch.float32, device).fill_(1.0)
    if torch.device(device).type == "cpu" and native.usable_variants():
        found = torch.empty(1, dtype=torch.int64)
        return size / statistics.median(
            call_seconds(lambda: read_memory(a.data_ptr(), size, found.data_ptr()), a.device, repeats)
        )
    return size / statistics.median(call_seconds(lambda: a.sum(), a.device, repeats))
