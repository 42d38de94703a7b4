"""Weights over memory nodes: what can be seen of it on a machine with one."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from leanseek.machine import memory, numa
from leanseek.native.library import usable_variants

native = pytest.mark.skipif(not (usable_variants() and numa.memory_nodes()), reason="no kernels, or no /sys of nodes")


@pytest.mark.parametrize(
    ("text", "numbers"), [("0\n", [0]), ("0-1,4\n", [0, 1, 4]), ("2,8-10", [2, 8, 9, 10]), ("\n", []), ("", [])]
)
def test_lists_as_linux_writes_them(text: str, numbers: list[int]) -> None:
    assert numa.parse_list(text) == numbers


def test_nodes_with_memory_and_a_cpu_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 1 is another socket, which this process keeps off; node 2 is memory alone; node 3 has no memory."""
    for node, cpus in enumerate(("0-3\n", "4-7\n", "\n", "8-9\n", "10-11\n")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    (tmp_path / "has_memory").write_text("0-2,4\n")
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3, 8, 11})
    assert numa.memory_nodes.__wrapped__() == (0, 4)
    monkeypatch.setattr(numa, "_NODES", tmp_path / "nothing")
    assert numa.memory_nodes.__wrapped__() == ()


@native
def test_interleaved_memory_is_memory() -> None:
    """Over the nodes there are; the kernel then says `interleave` of the mapping that holds it."""
    memory = mmap.mmap(-1, 2**22)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    refusal = numa.interleave(pages.data_ptr(), pages.numel(), numa.memory_nodes())
    assert refusal in (None, os.strerror(1), os.strerror(38), "the process was given a memory policy")
    assert pages.fill_(7).sum() == 7 * 2**22
    maps = Path("/proc/self/numa_maps")
    if refusal is None and maps.exists():
        assert re.search(rf"^{pages.data_ptr():x} interleave", maps.read_text(), re.MULTILINE)


@native
def test_a_node_that_is_not_there_is_a_refusal() -> None:
    pages = torch.frombuffer(mmap.mmap(-1, 2**12), dtype=torch.uint8)
    for node in (63, 64, 130):
        assert numa.interleave(pages.data_ptr(), pages.numel(), [node]) is not None
    assert pages.fill_(1).sum() == 2**12


@native
def test_a_policy_of_the_process_stays() -> None:
    """As under `numactl --localalloc`; a policy is its thread's, so it is set in one that ends."""

    def local_then_interleave() -> tuple[int, str | None]:
        set_mempolicy, local = 238, 4
        done = ctypes.CDLL(None).syscall(set_mempolicy, local, None, 0)
        pages = torch.frombuffer(mmap.mmap(-1, 2**12), dtype=torch.uint8)
        return done, numa.interleave(pages.data_ptr(), pages.numel(), numa.memory_nodes())

    with ThreadPoolExecutor(1) as pool:
        done, refusal = pool.submit(local_then_interleave).result()
    if done != 0:
        pytest.skip("set_mempolicy is refused here")
    assert refusal == "the process was given a memory policy"


@native
def test_weights_are_interleaved_where_there_are_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def recorded(start: int, size: int, nodes: tuple[int, ...]) -> None:
        assert nodes == (0, 1)
        asked.append((start, size))

    monkeypatch.setattr(numa, "interleave", recorded)
    memory.empty((memory.HUGE_PAGE,), torch.uint8, "cpu")
    assert bool(asked) == (len(numa.memory_nodes()) > 1)
    asked.clear()
    monkeypatch.setattr(numa, "memory_nodes", lambda: (0, 1))
    weight = memory.empty((2 * memory.HUGE_PAGE,), torch.uint8, "cpu")
    ((start, size),) = asked
    assert start % mmap.PAGESIZE == 0
    assert start - weight.data_ptr() < mmap.PAGESIZE
    assert start + size == weight.data_ptr() + weight.numel()


def test_the_line_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    for nodes, refusal, line in (
        ((), None, "1, nothing to interleave"),
        ((0,), None, "1, nothing to interleave"),
        ((0, 1), None, "2, weights interleaved"),
        ((0, 1), "Operation not permitted", "2, weights not interleaved: Operation not permitted"),
    ):
        monkeypatch.setattr(numa, "memory_nodes", lambda nodes=nodes: nodes)
        monkeypatch.setattr(numa, "interleave", lambda start, size, nodes, refusal=refusal: refusal)
        assert numa.placement() == line
