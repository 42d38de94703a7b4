"""What a served step asks of these kernels, and where they accept it (invariant.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.ops.dispatch import register
from leanseek.ops.latent_attention import CacheIndex
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


@register("linear", "triton", _multiplies, row_invariant=True)
def linear(x: Tensor, weight: Tensor, scale_inv: Tensor | None = None) -> Tensor:
    from leanseek.ops.triton import invariant

    return invariant.linear(x, weight, scale_inv)


@register("head_linear", "triton", _multiplies, row_invariant=True)
def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    from leanseek.ops.triton import invariant

    return invariant.head_linear(x, weight)


@register("experts", "triton", _multiplies, row_invariant=True)
def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    from leanseek.ops.triton import invariant

    return invariant.experts(x, indices, weights, gate_up, down, scales)


@register("latent_attention", "triton", takes_rows, row_invariant=True)
def latent_attention(q: Tensor, cache: Tensor, index: CacheIndex, scale: float, value_width: int) -> Tensor:
    from leanseek.ops.triton import invariant

    return invariant.latent_attention(q, cache, index, scale, value_width)
