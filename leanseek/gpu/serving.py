"""Registers the kernels of invariant.py for a serving step, and says which arguments they accept."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

from leanseek import ops
from leanseek.gpu.device import implements
from leanseek.gpu.training import takes_rows
from leanseek.ops.dispatch import Op, Rows
from leanseek.ops.experts import Dispatched, products_of_rows
from leanseek.ops.weights import FP8_BLOCKS, QuantizedWeight, StoredWeight


def _multiplies(x: Tensor, weight: StoredWeight) -> bool:
    """Weights of x's dtype, or FP8 blocks."""
    if not takes_rows(x) or weight.device != x.device:
        return False
    return weight.format == FP8_BLOCKS if isinstance(weight, QuantizedWeight) else weight.dtype == x.dtype


def _of_experts(sent: Dispatched, gate_up: StoredWeight, down: StoredWeight) -> bool:
    return _multiplies(sent.x, gate_up) and _multiplies(sent.x, down)


@implements(ops.rms_norm, takes_rows, Rows.INVARIANT)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from leanseek.gpu.elementwise import norm_forward

    return norm_forward(x, weight, eps)[0]


def _of_invariant(name: str) -> Callable[..., Tensor]:
    """Calls the function of that name in invariant.py, which is imported at the first call."""

    def run(*arguments: object) -> Tensor:
        found: Tensor = getattr(importlib.import_module("leanseek.gpu.invariant"), name)(*arguments)
        return found

    return run


_FORMS: tuple[tuple[Op[..., Tensor], Callable[..., bool]], ...] = (
    (ops.linear, _multiplies),
    (ops.head_linear, _multiplies),
    (products_of_rows, _of_experts),
    (ops.latent_attention, takes_rows),
)
for _op, _accepts in _FORMS:
    implements(_op, _accepts, Rows.INVARIANT)(_of_invariant(_op.name))
