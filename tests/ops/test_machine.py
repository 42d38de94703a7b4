"""The number of threads: what may be asked for, and what is taken when nobody asks."""

from __future__ import annotations

import os

import pytest
import torch

from leanseek.errors import InputError
from leanseek.ops import cpu, machine


@pytest.mark.parametrize("variant", cpu.usable_variants())
def test_all_of_the_memory_is_read(variant: str) -> None:
    data, found = torch.randint(-(2**60), 2**60, (3 * 2**17,)), torch.empty((), dtype=torch.int64)
    with cpu.use_variant(variant):
        machine._read(data.data_ptr(), data.numel() * 8, found.data_ptr())
    assert found == data.sum()  # both modulo 2^64


def test_threads_that_are_asked_for() -> None:
    machine.use_threads(3)
    assert torch.get_num_threads() == 3
    for count in (0, -1, 4 * (os.cpu_count() or 1) + 1):
        with pytest.raises(InputError, match=f"threads must lie between 1 and .*; {count} does not"):
            machine.use_threads(count)


def test_one_thread_a_physical_core_unless_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six CPUs of which the process may use five, on three cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3, 5})
    monkeypatch.setattr(machine, "_siblings", lambda cpu: f"{cpu % 3},{cpu % 3 + 3}")
    for environment, expected in (({}, 3), ({"OMP_NUM_THREADS": "4"}, 4)):
        torch.set_num_threads(4)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        machine.use_threads(None)
        assert torch.get_num_threads() == expected
    assert machine.physical_cores() == 3
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.use_threads(None)
    assert torch.get_num_threads() == 2  # torch's own choice, where it is smaller
