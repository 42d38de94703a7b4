"""What a served step asks of these kernels, and where they accept it (invariant.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from leanseek.ops.dispatch import register
from leanseek.ops.triton.training import takes_rows


def _multiplies(x: Tensor, weight: Tensor, *scales: Tensor | None) -> bool:
    """Weights of x's dtype, or FP8 with the scales of its blocks."""
    if not takes_rows(x) or weight.device != x.device:
        return False
    if any(scale is None for scale in scales) or not scales:
        return weight.dtype == x.dtype
    return weight.dtype == torch.float8_e4m3fn and all(s is not None and s.dtype == torch.float32 for s in scales)


@register("rms_norm", "triton", takes_rows, row_invariant=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from leanseek.ops.triton.elementwise import norm_forward

    return norm_forward(x, weight, eps)[0]


def _of_invariant(op: str) -> Callable[..., Tensor]:
    """The kernel module's function of that name, imported when it is first called."""

    def run(*arguments: object) -> Tensor:
        found: Tensor = getattr(importlib.import_module("leanseek.ops.triton.invariant"), op)(*arguments)
        return found

    return run


for _op, _accepts in (
    ("linear", _multiplies),
    ("head_linear", _multiplies),
    ("experts", _multiplies),
    ("latent_attention", takes_rows),
):
    register(_op, "triton", _accepts, row_invariant=True)(_of_invariant(_op))
