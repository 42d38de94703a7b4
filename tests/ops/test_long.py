"""Long sequences: attention holds no T × T, the loss of the head no T × V, forward and backward, in every form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from leanseek import ops

LENGTH, HEADS, NOPE, ROPE, VALUE = 4096, 2, 16, 8, 16
VOCAB, WIDTH = 32768, 16
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(work: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward and its backward take beside what was there, once they have run before."""
    work().sum().backward()
    RESET.write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    work().sum().backward()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(key))


def attention(dtype: torch.dtype) -> torch.Tensor:
    q = torch.randn(1, LENGTH, HEADS, NOPE + ROPE, dtype=dtype, requires_grad=True)
    kv = torch.randn(1, LENGTH, HEADS, NOPE + VALUE, dtype=dtype, requires_grad=True)
    k_rope = torch.randn(1, LENGTH, ROPE, dtype=dtype, requires_grad=True)
    angles = torch.randn(1, LENGTH, ROPE // 2)
    return ops.mla_attention(q, kv, k_rope, angles.cos(), angles.sin(), 0.2, True)


def loss(dtype: torch.dtype) -> torch.Tensor:
    hidden = torch.randn(LENGTH, WIDTH, dtype=dtype, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH, requires_grad=True)
    return ops.linear_cross_entropy(hidden, head, torch.arange(LENGTH))


@pytest.mark.skipif(not RESET.exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("work", "whole"), [(attention, LENGTH * LENGTH * HEADS), (loss, LENGTH * VOCAB)])
def test_a_step_holds_no_square(
    backend: str, dtype: torch.dtype, work: Callable[[torch.dtype], torch.Tensor], whole: int
) -> None:
    """`whole` values of two bytes are what a kernel that materialises holds at least."""
    with ops.use(backend):
        assert peak(lambda: work(dtype)) < whole * 2 * 0.75
