"""Causal attention, forward and backward, in blocks; for MLA it rotates queries and the shared key as well."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek import ops
from leanseek.native.library import DTYPES, Function, accepts, implements, kernel, pointers

_forward = kernel("attention_forward", "np pppp pp f pp")
_backward = kernel("attention_backward", "np pppp pp f pp p pppp p")


class _Attention(Function):
    """Keeps its inputs, the output and one number per query and head; scores are computed again in backward.

    q [B, T, H, nope + rope]; kv [B, T, Hkv, nope + value]; k_rope [B, T, rope], cos and sin [B or 1, T, rope / 2], or
    None where rope is 0 and nothing is rotated.
    """

    @staticmethod
    def forward(ctx, q, kv, k_rope, cos, sin, scale, interleave):  # type: ignore[no-untyped-def]
        nope = q.shape[3] - (0 if k_rope is None else k_rope.shape[2])
        out = torch.empty(*q.shape[:3], kv.shape[3] - nope, dtype=q.dtype)
        log_sum = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        problem = _problem(q, kv, k_rope, cos, nope, interleave)
        inputs = pointers(problem, q, kv, k_rope, kv[..., nope:], cos, sin)
        _forward(DTYPES[q.dtype], *inputs, scale, *pointers(out, log_sum))
        ctx.save_for_backward(problem, q, kv, k_rope, cos, sin, out, log_sum)
        ctx.nope, ctx.scale = nope, scale
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        problem, q, kv, k_rope, cos, sin, out, log_sum = ctx.saved_tensors
        nope, grad = ctx.nope, grad.contiguous()
        dq, dkv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, kv))
        dk_rope = None if k_rope is None else torch.empty(k_rope.shape, dtype=q.dtype)
        work = torch.empty(*kv.shape[:3], q.shape[3] - nope, dtype=torch.float32)
        _backward(
            DTYPES[q.dtype], *pointers(problem, q, kv, k_rope, kv[..., nope:], cos, sin), ctx.scale,
            *pointers(out, log_sum, grad, dq, dkv, dk_rope, dkv[..., nope:], work),
        )  # fmt: skip
        return dq, dkv, dk_rope, None, None, None, None


def _problem(q: Tensor, kv: Tensor, k_rope: Tensor | None, cos: Tensor | None, nope: int, interleave: bool) -> Tensor:
    """The numbers of attention.cpp's `struct Problem`, int64."""
    batch, length, heads, width = q.shape
    angle_stride = 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)
    sizes = [batch, length, heads, kv.shape[2], nope, width - nope, kv.shape[3] - nope, int(interleave), angle_stride]
    shared = [0, 0, 0] if k_rope is None else [*k_rope.stride()[:2], 0]
    gradient = [length * kv.shape[2] * kv.shape[3], kv.shape[2] * kv.shape[3], kv.shape[3]]  # of dkv, contiguous
    own = list(kv.stride()[:3])
    return torch.tensor(sizes + list(q.stride()[:3]) + own + shared + own + gradient + gradient)


def _mla(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, interleave: bool) -> bool:
    return accepts(q, kv, k_rope, cos, sin) and q.dtype == kv.dtype == k_rope.dtype and q.numel() > 0


@implements(ops.mla_attention, _mla)
def mla_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, interleave: bool
) -> Tensor:
    return _Attention.apply(q, kv, k_rope, cos.contiguous(), sin.contiguous(), scale, interleave)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    return accepts(q, k, v) and q.dtype == k.dtype == v.dtype and q.numel() > 0


@implements(ops.causal_attention, _plain)
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _Attention.apply(q, torch.cat((k, v), dim=-1), None, None, None, scale, False)
