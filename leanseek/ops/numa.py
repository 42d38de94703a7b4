"""Memory nodes: where a machine has several, the pages of weights are dealt out over them, as every core reads all."""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from leanseek.ops.cpu.library import kernel, usable_variants

_NODES = Path("/sys/devices/system/node")
_interleave = kernel("interleave_pages", "pn pn p")


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
    """Nodes with memory and with a CPU that this process may run on; none where the system names none.

    Memory without CPUs (CXL) is slow, and that of a socket that a process keeps off is far: weights lie in neither.
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
    """Have the `size` bytes from address `start` on, whole pages not touched yet, dealt out over `nodes`.

    None, or why it was refused: such memory is as good, only slower.
    """
    if not usable_variants():
        return "there are no native kernels"
    bits = max(nodes) + 1
    words = [sum(1 << n % 64 for n in nodes if n // 64 == word) for word in range(bits // 64 + 1)]
    mask = torch.tensor([word - (word >> 63 << 64) for word in words])  # as signed
    outcome = torch.zeros(1, dtype=torch.int64)
    _interleave(start, size, mask.data_ptr(), bits, outcome.data_ptr())
    code = int(outcome)
    return None if code == 0 else "the process was given a memory policy" if code < 0 else os.strerror(code)


def placement() -> str:
    """One line for `leanseek doctor`: how many nodes, and whether weights are interleaved over them."""
    nodes = memory_nodes()
    if len(nodes) < 2:
        return f"{max(1, len(nodes))}, nothing to interleave"
    page = torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.uint8)
    refusal = interleave(page.data_ptr(), mmap.PAGESIZE, nodes)
    return (
        f"{len(nodes)}, weights interleaved" if refusal is None else f"{len(nodes)}, weights not interleaved: {refusal}"
    )
