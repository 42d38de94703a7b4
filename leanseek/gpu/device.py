"""Which GPUs these kernels run on, and how a form is registered for them."""

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
    """Empty where these kernels run, else the reason."""
    if device.type != "cuda":
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "E4M3 needs compute capability 8.9 or more"
    return ""


def complaint(error: Exception) -> str:
    """The reason why a trial failed, in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def implements(op: Op[..., Any], accepts: Callable[..., bool], rows: Rows = Rows.ANY) -> Callable[[F], F]:
    """Decorator: the function computes `op` on a GPU where `accepts`, called as the op is, holds."""
    return op.register("gpu", accepts, Priority.KERNEL, rows)
