"""Which GPUs these kernels run on, and the decorator that registers a kernel for them."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from leanseek.ops.dispatch import Op, Priority, Rows

F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def refusal(device: torch.device) -> str:
    """Why these kernels do not run on `device`; empty if they do."""
    if device.type != "cuda":
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "E4M3 needs compute capability 8.9 or more"
    return ""


def complaint(error: Exception) -> str:
    """Why a trial failed, in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def implements(op: Op[..., Any], accepts: Callable[..., bool], rows: Rows = Rows.ANY) -> Callable[[F], F]:
    """Decorator: the function computes `op` on a GPU where `accepts`, called with the op's arguments, returns true."""
    return op.register("gpu", accepts, Priority.KERNEL, rows)
