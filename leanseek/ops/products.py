"""Matrix products in plain torch, in a form that every CPU has.

Few CPUs multiply BF16 or float16. Where oneDNN has no such product torch raises, or takes a loop of 0.3 GFLOP/s. There
the operands are widened to float32, which holds each of their values, and the result is rounded once.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has products of `dtype`. Asked once, by a small one: what cpuid says, ONEDNN_MAX_CPU_ISA may
    have taken away."""
    if dtype not in NARROW:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        onednn_linear(torch.ones(2, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))
    except RuntimeError:  # could not create a primitive descriptor
        return False
    return True


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] · weight [out, in]ᵀ by oneDNN, which torch's own linear asks only for some sizes."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


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
