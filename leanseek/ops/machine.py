"""What this machine can do: the compute dtype to prefer and the measured limits that speeds are quoted against."""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leanseek.ops import cpu
from leanseek.ops.cpu.library import kernel

HUGE_PAGE = 2**21  # bytes
_read = kernel("read_memory", "pnp")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def preferred_dtype(device: torch.device | str) -> torch.dtype:
    """BF16 where the hardware multiplies it (CUDA, AVX512_BF16, AMX); else float32, as BF16 is emulated there."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """As torch.empty, asking Linux for huge pages on the CPU: weights read once a token miss fewer address lookups."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and sys.platform == "linux" and size >= HUGE_PAGE:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + size - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)  # advice only
    return tensor


def gemm_rate(dtype: torch.dtype, device: torch.device | str, size: int = 2048, repeats: int = 5) -> float:
    """Measured FLOP/s of a square product of `size`, the median of `repeats`."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _median_seconds(lambda: a @ a, torch.device(device), repeats)


def read_bandwidth(device: torch.device | str, size: int = 2**28, repeats: int = 5) -> float:
    """Measured bytes/s of reading `size` bytes with all threads, the median of `repeats`."""
    a = empty((size // 4,), torch.float32, device).fill_(1.0)
    if torch.device(device).type == "cpu" and cpu.usable_variants():
        found = torch.empty(1, dtype=torch.int64)
        return size / _median_seconds(lambda: _read(a.data_ptr(), size, found.data_ptr()), a.device, repeats)
    return size / _median_seconds(lambda: a.sum(), a.device, repeats)


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
