"""Matrix products in plain torch, in a form that every CPU has.

Few CPUs multiply BF16 or float16. Where oneDNN has no such product torch raises, or takes a loop of 0.3 GFLOP/s. There
the operands are widened to float32, which holds each of their values, and the result is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.machine.device import multiplies


def wide(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product as this machine multiplies them; the result is to be rounded to their dtype."""
    return tuple(t if t.device.type != "cpu" or multiplies(t.dtype) else t.float() for t in operands)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ, both of one dtype."""
    return F.linear(*wide(x, weight)).to(x.dtype)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a [M, K] · b [K, N] into out [M, N], rounded to its dtype."""
    a, b = wide(a, b)
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
