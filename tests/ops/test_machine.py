"""The number of threads that may be asked for, and the measured limits of the machine."""

from __future__ import annotations

import pytest
import torch

from leanseek import native
from leanseek.bench.machine import read_memory
from leanseek.errors import InputError
from leanseek.machine import device, probes
from leanseek.machine.threads import cpus


@pytest.mark.parametrize("variant", native.usable_variants())
def test_all_of_the_memory_is_read(variant: str) -> None:
    data, found = torch.randint(-(2**60), 2**60, (3 * 2**17,)), torch.empty((), dtype=torch.int64)
    with native.use_variant(variant):
        read_memory(data.data_ptr(), data.numel() * 8, found.data_ptr())
    assert found == data.sum()  # both modulo 2^64


def test_threads_that_are_asked_for() -> None:
    device.use_threads(3)
    assert torch.get_num_threads() == 3
    for count in (0, -1, 4 * cpus() + 1):
        with pytest.raises(InputError, match=f"threads must lie between 1 and .*; {count} does not"):
            device.use_threads(count)


class Multiplier:
    """A machine that multiplies at `rate` FLOP/s, and its clock."""

    def __init__(self, rate: float):
        self.rate, self.now = rate, 0.0

    def multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.side = len(a)
        self.now += 2 * self.side**3 / self.rate
        return a


@pytest.mark.parametrize(("rate", "side"), [(2e11, 2048), (3e10, 1024), (3e8, 256), (1e6, 128)])
def test_a_probe_is_bounded_in_time(rate: float, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 on two cores, on a slow one, BF16 emulated, and worse: never minutes, and the rate is right."""
    here = Multiplier(rate)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: here.multiply(a, b))
    monkeypatch.setattr(probes.time, "perf_counter", lambda: here.now)
    assert probes.gemm_rate(torch.float32, "cpu") == pytest.approx(rate)
    assert here.side == side
    assert here.now < max(2 * probes.PROBE_SECONDS, 3 * 2 * 128**3 / rate)


def test_the_best_of_a_probe_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process took the CPU from every second product."""
    here, calls = Multiplier(1e11), []
    monkeypatch.setattr(probes.time, "perf_counter", lambda: here.now)

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        here.now += 0.003 * (len(calls) % 2)
        return here.multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    assert probes.gemm_rate(torch.float32, "cpu") == pytest.approx(1e11)
