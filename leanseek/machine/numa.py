"""Memory nodes: on a machine with several, weights are interleaved over them, because every core reads all weights."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

_NODES = Path("/sys/devices/system/node")
_MBIND, _GET_MEMPOLICY = (237, 239) if platform.machine() == "x86_64" else (235, 236)  # numbers of the system calls
_DEFAULT, _INTERLEAVE = 0, 3  # linux/mempolicy.h


def parse_list(text: str) -> list[int]:
    """Numbers as Linux lists them: "0-1,4" -> [0, 1, 4]."""
    found: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return found


@functools.cache
def memory_nodes() -> tuple[int, ...]:
    """Nodes that have memory and a CPU this process may run on; empty if the system reports none.

    Memory without CPUs (CXL) is slow, and memory of another socket is far away: both are left out.
    """
    try:
        cpus = os.sched_getaffinity(0)
        nodes = parse_list((_NODES / "has_memory").read_text(encoding="ascii"))
        return tuple(
            n for n in nodes if cpus & {*parse_list((_NODES / f"node{n}" / "cpulist").read_text(encoding="ascii"))}
        )
    except (OSError, AttributeError, ValueError):  # not Linux, or no /sys
        return ()


def interleave(start: int, size: int, nodes: Sequence[int]) -> str | None:
    """Interleave `size` bytes from address `start`, whole pages not yet touched, over `nodes`.

    Returns None, or why the system refused: the memory then works as well, only slower.
    """
    if not sys.platform.startswith("linux"):
        return "only Linux interleaves"
    system, policy = ctypes.CDLL(None, use_errno=True).syscall, ctypes.c_int(_DEFAULT)
    if system(_GET_MEMPOLICY, ctypes.byref(policy), None, 0, None, 0) == 0 and policy.value != _DEFAULT:
        return "the process was given a memory policy"
    words = (ctypes.c_uint64 * (max(nodes) // 64 + 1))()
    for n in nodes:
        words[n // 64] |= 1 << n % 64
    # the kernel takes the number of bits plus one
    arguments = ctypes.c_void_p(start), ctypes.c_size_t(size), _INTERLEAVE, words, ctypes.c_ulong(max(nodes) + 2), 0
    return None if system(_MBIND, *arguments) == 0 else os.strerror(ctypes.get_errno())


def placement() -> str:
    """One line for `leanseek doctor`: the number of nodes, and whether weights are interleaved."""
    nodes = memory_nodes()
    if len(nodes) < 2:
        return f"{max(1, len(nodes))}, nothing to interleave"
    page = torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.uint8)
    refusal = interleave(page.data_ptr(), mmap.PAGESIZE, nodes)
    return (
        f"{len(nodes)}, weights interleaved" if refusal is None else f"{len(nodes)}, weights not interleaved: {refusal}"
    )
