"""What a served step asks of these kernels, and where they accept it (invariant.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from leanseek import ops
from leanseek.gpu.device import implements
from leanseek.gpu.training import takes_rows
from leanseek.ops.dispatch import Op, Rows
from leanseek.ops.experts import grouped_experts


def _multiplies(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> bool:
    """Weights of x's dtype, or FP8 with the scales of its blocks."""
    if not takes_rows(x) or weight.device != x.device:
        return False
    if scale is None:
        return weight.dtype == x.dtype
    return weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32


def _of_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> bool:
    return all(_multiplies(x, *pair) for pair in zip((gate_up, down), scales or (None, None), strict=True))


@implements(ops.rms_norm, takes_rows, Rows.INVARIANT)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from leanseek.gpu.elementwise import norm_forward

    return norm_forward(x, weight, eps)[0]


def _of_invariant(name: str) -> Callable[..., Tensor]:
    """The kernel module's function of that name, imported when it is first called."""

    def run(*arguments: object) -> Tensor:
        found: Tensor = getattr(importlib.import_module("leanseek.gpu.invariant"), name)(*arguments)
        return found

    return run


_FORMS: tuple[tuple[Op[..., Tensor], Callable[..., bool]], ...] = (
    (ops.linear, _multiplies),
    (ops.head_linear, _multiplies),
    (grouped_experts, _of_experts),
    (ops.latent_attention, takes_rows),
)
for _op, _accepts in _FORMS:
    implements(_op, _accepts, Rows.INVARIANT)(_of_invariant(_op.name))
