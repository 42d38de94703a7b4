"""SwiGLU's activation, alone and with each row times its gate value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.dispatch import op


@op("swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise. gate, up [..., I]."""
    return F.silu(gate) * up


@op("weighted_swiglu")
def weighted_swiglu(hidden: Tensor, weight: Tensor) -> Tensor:
    """weight [M] · silu(gate) · up of hidden [M, 2I], gate first."""
    gate, up = _wide(hidden).chunk(2, dim=-1)
    return (F.silu(gate) * up * weight[:, None]).to(hidden.dtype)


@op("weighted_swiglu_backward")
def weighted_swiglu_backward(hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`weighted_swiglu` again, and the gradients of hidden and weight."""
    gate, up = _wide(hidden).chunk(2, dim=-1)
    dgate, dup, act, dweight = swiglu_gradient(gate, up, weight, _wide(grad))
    assert dweight is not None
    return act.to(grad.dtype), torch.cat((dgate, dup), dim=-1).to(hidden.dtype), dweight


def swiglu_gradient(
    gate: Tensor, up: Tensor, weight: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up [M, I], the weighted activation again, the gradient of weight [M]: no rounding."""
    sig = torch.sigmoid(gate)
    silu = gate * sig
    act, dweight = silu * up, None
    if weight is not None:
        dweight = (grad * act).sum(-1)
        act, grad = act * weight[:, None], grad * weight[:, None]
    return grad * up * (sig + silu * (1 - sig)), grad * silu, act, dweight


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
