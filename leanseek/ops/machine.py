"""What this machine can do: the compute dtype to prefer, the threads to run on, and the measured limits that speeds are
quoted against."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from leanseek.errors import InputError
from leanseek.ops import cpu, numa
from leanseek.ops.cpu.library import kernel
from leanseek.ops.products import multiplies

HUGE_PAGE = 2**21  # bytes
_read = kernel("read_memory", "pnp")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def preferred_dtype(device: torch.device | str) -> torch.dtype:
    """BF16 where the hardware multiplies it (CUDA, AVX512_BF16, AMX) and oneDNN may; else float32: BF16 is emulated."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native and multiplies(torch.bfloat16) else torch.float32


def use_threads(count: int | None) -> None:
    """Run torch and the native kernels, which share its pool, on `count` CPU threads.

    None: as many as torch picks, and at most one a physical core, unless OMP_NUM_THREADS says how many. OpenMP keeps
    the number for each thread apart; a thread that begins later has it from its first native kernel on.

    Raises:
        InputError: fewer than one, or more than four for each of the machine's CPUs.
    """
    if count is None:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(torch.get_num_threads(), physical_cores()))
        return
    cpus = os.cpu_count() or 1
    if not 1 <= count <= 4 * cpus:
        raise InputError(f"threads must lie between 1 and {4 * cpus}, four a CPU of this machine; {count} does not")
    torch.set_num_threads(count)


def physical_cores() -> int:
    """Cores that this process may run on: two CPUs that share one core count once."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    """The CPUs on the core of this one, as Linux writes them: "0,16"."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """As torch.empty; on the CPU Linux is asked for huge pages, interleaved over the memory nodes if there are several.

    Weights read once a token then miss fewer address lookups, and take the bandwidth of all nodes.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and sys.platform == "linux" and size >= HUGE_PAGE:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + size - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)  # advice only
        if len(nodes := numa.memory_nodes()) > 1:
            numa.interleave(start, length, nodes)  # a refusal is shown by `leanseek doctor`
    return tensor


def read_ahead(start: int, size: int) -> None:
    """Have Linux read a mapped file from the disk before its pages are asked for one by one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_WILLNEED)


def gemm_rate(dtype: torch.dtype, device: torch.device | str, size: int | None = None, repeats: int = 5) -> float:
    """Measured FLOP/s of a square product of `size` (2048, on a GPU 8192), the median of `repeats`."""
    size = size or (8192 if torch.device(device).type == "cuda" else 2048)
    a = torch.randn(size, size, device=device).to(dtype)  # a chip draws less power, and runs faster, on constants
    return 2 * size**3 / _median_seconds(lambda: a @ a, torch.device(device), repeats)


def read_bandwidth(device: torch.device | str, size: int | None = None, repeats: int = 5) -> float:
    """Measured bytes/s of reading `size` bytes (256 MiB, on a GPU 4 GiB) with all threads, the median of `repeats`."""
    size = size or (2**32 if torch.device(device).type == "cuda" else 2**28)
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
