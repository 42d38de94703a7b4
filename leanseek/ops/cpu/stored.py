"""Serving's ops over weights as they are stored (FP8 blocks, BF16, FP32), and attention over the latent cache.

All of them are row-invariant: a row's result does not depend on the rows it shares a call with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.ops.cpu.library import DTYPES, kernel, pointers
from leanseek.ops.dispatch import register
from leanseek.ops.latent_attention import CacheIndex

_linear = kernel("stored_linear", "npp nn np n p")
_experts = kernel("stored_experts", "npppp nnn np pp nn p")
_attention = kernel("latent_attention", "np nnn ppp nnn np n f p")

KINDS = DTYPES | {torch.float8_e4m3fn: 2, torch.uint8: 3}  # stored.h


def _stored(x: Tensor, weight: Tensor, *scales: Tensor | None) -> bool:
    """Inference on the CPU over contiguous weights of a kind the kernels decode."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and weight.dtype in KINDS
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and all(s is None or s.is_contiguous() for s in scales)
    )


@register("linear", "cpu", _stored, row_invariant=True)
def linear(x: Tensor, weight: Tensor, scale_inv: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(rows.shape[0], weight.shape[0])
    _linear(
        KINDS[weight.dtype], *pointers(weight, scale_inv), *weight.shape,
        DTYPES[x.dtype], rows.data_ptr(), rows.shape[0], out.data_ptr(),
    )  # fmt: skip
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


@register("experts", "cpu", _stored, row_invariant=True)
def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    n_experts, d, i = down.shape
    rows, indices, weights = x.contiguous(), indices.contiguous(), weights.float().contiguous()
    out = torch.empty(rows.shape)
    up_scale, down_scale = (None, None) if scales is None else (s.data_ptr() for s in scales)
    _experts(
        KINDS[gate_up.dtype], gate_up.data_ptr(), up_scale, down.data_ptr(), down_scale, n_experts, i, d,
        DTYPES[x.dtype], rows.data_ptr(), indices.data_ptr(), weights.data_ptr(), *indices.shape, out.data_ptr(),
    )  # fmt: skip
    return out.to(x.dtype)


def _cached(q: Tensor, cache: Tensor) -> bool:
    return q.device.type == "cpu" and cache.dtype in DTYPES and cache.is_contiguous()


@register("latent_attention", "cpu", _cached)
@register("latent_attention", "cpu", _cached, row_invariant=True)
def latent_attention(q: Tensor, cache: Tensor, index: CacheIndex, scale: float, value_width: int) -> Tensor:
    tokens, heads, width = q.shape
    rows = q.float().contiguous()
    out = torch.empty(tokens, heads, value_width)
    pages = index.pages.contiguous()
    _attention(
        DTYPES[cache.dtype], cache.data_ptr(), width, value_width, index.page_size, index.positions.data_ptr(),
        index.row_offsets.data_ptr(), pages.data_ptr(), tokens, *pages.shape, q.dtype == torch.bfloat16,
        rows.data_ptr(), heads, scale, out.data_ptr(),
    )  # fmt: skip
    return out.to(q.dtype)
