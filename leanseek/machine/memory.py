"""Memory: how much there is, and weights laid out so that reading them is fast."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import resource
import sys
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from leanseek.machine import numa
from leanseek.machine.threads import groups

HUGE_PAGE = 2**21  # bytes


def memory(device: torch.device | str) -> int:
    """Bytes this process may use on a device: all memory, or what its control group or `ulimit -v` allows."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [psutil.virtual_memory().total]
    for folder in groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2; 1
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((folder / name).read_text(encoding="ascii")))
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(limits + ([space] if space != resource.RLIM_INFINITY else []))


def available() -> int:
    """Bytes of the host's memory that are free or can be freed, within what this process's control group allows."""
    free = [psutil.virtual_memory().available]
    for folder in groups("memory"):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or "max"
                limit, taken = (int((folder / name).read_text(encoding="ascii")) for name in (most, used))
                pairs = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                free.append(limit - taken + int(dict(pairs)["inactive_file"]))  # files' pages give way
    return min(free)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Like torch.empty; on Linux CPUs with huge pages, interleaved over the memory nodes if there are several.

    Weights that are read once per token then cause fewer TLB misses and use the bandwidth of all nodes.
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
    """Ask Linux to read a mapped file from disk ahead of the page faults."""
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_WILLNEED)
