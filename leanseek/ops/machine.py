"""What this machine can do: the compute dtype to prefer, the threads to run on, and the measured limits that speeds are
quoted against."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import psutil
import torch
from torch import Tensor

from leanseek.errors import InputError
from leanseek.ops import cpu, numa
from leanseek.ops.cpu.library import kernel
from leanseek.ops.products import multiplies
from leanseek.threads import cpus, groups

HUGE_PAGE = 2**21  # bytes
PROBE_SECONDS = 1.0
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
    """Run torch and the native kernels, which share its pool, on `count` CPU threads; None leaves their number alone.

    OpenMP keeps the number for each thread apart; a thread that begins later has it from its first native kernel on.

    Raises:
        InputError: fewer than one, or more than four for each of the CPUs that this process may use.
    """
    if count is None:
        return
    most = 4 * cpus()
    if not 1 <= count <= most:
        raise InputError(f"threads must lie between 1 and {most}, four a CPU that may be used here; {count} does not")
    torch.set_num_threads(count)


def memory(device: torch.device | str) -> int:
    """Bytes that this process may have on a device: the machine's, or what a control group or `ulimit -v` leaves."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [psutil.virtual_memory().total]
    for folder in groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2; 1
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((folder / name).read_text(encoding="ascii")))
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(limits + ([space] if space != resource.RLIM_INFINITY else []))


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


def gemm_rate(
    dtype: torch.dtype, device: torch.device | str, size: int | None = None, seconds: float = PROBE_SECONDS
) -> float:
    """Measured FLOP/s of square products, the best seen in about `seconds`.

    Their side doubles from 128 up to `size` (2048, on a GPU 8192) while there is time: a dtype that is emulated at a
    thousandth of the speed is judged by smaller products, and soon.
    """
    device = torch.device(device)
    size, side, best = size or (8192 if device.type == "cuda" else 2048), 128, 0.0
    end = time.perf_counter() + seconds
    while True:
        a = torch.randn(side, side, device=device).to(dtype)  # a chip draws less power, and runs faster, on constants
        took = min(_seconds(lambda a=a: a @ a, device, 5, end))  # type: ignore[misc]
        best = max(best, 2 * side**3 / took)
        if 2 * side > size or time.perf_counter() + 2 * 8 * took > end:  # twice as wide, at least two of them
            return best
        side *= 2


def read_bandwidth(device: torch.device | str, size: int | None = None, repeats: int = 5) -> float:
    """Measured bytes/s of reading `size` bytes (256 MiB, on a GPU 4 GiB) with all threads, the median of `repeats`."""
    size = size or (2**32 if torch.device(device).type == "cuda" else 2**28)
    a = empty((size // 4,), torch.float32, device).fill_(1.0)
    if torch.device(device).type == "cpu" and cpu.usable_variants():
        found = torch.empty(1, dtype=torch.int64)
        return size / statistics.median(
            _seconds(lambda: _read(a.data_ptr(), size, found.data_ptr()), a.device, repeats)
        )
    return size / statistics.median(_seconds(lambda: a.sum(), a.device, repeats))


def _seconds(work: Callable[[], object], device: torch.device, repeats: int, end: float = math.inf) -> list[float]:
    """What each of `repeats` calls took, after one that is not counted; fewer, but one, where `end` comes first."""
    times: list[float] = []
    while len(times) <= repeats and (len(times) < 2 or time.perf_counter() < end):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[1:]
