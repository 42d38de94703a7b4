"""Causal attention over expanded keys and values: training and whole-sequence prefill."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.dispatch import op
from leanseek.ops.products import wide
from leanseek.ops.rotary import rotate


@op("causal_attention")
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale, causal) v.

    q [B, T, H, dk]; k [B, T, Hkv, dk]; v [B, T, Hkv, dv]; Hkv divides H (GQA). Returns [B, T, H, dv].
    """
    # torch's fused CPU kernel wants equal head dims: zero columns on the narrower cost less than the unfused path
    width, value_width, dtype = max(q.shape[-1], v.shape[-1]), v.shape[-1], q.dtype
    q, k, v = wide(q, k, v)
    q, k, v = ((t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))).transpose(1, 2) for t in (q, k, v))
    gqa = bool(q.shape[1] != k.shape[1])  # torch.jit.trace makes sizes tensors
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    return out[..., :value_width].transpose(1, 2).to(dtype)


@op("mla_attention")
def mla_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, interleave: bool
) -> Tensor:
    """Causal attention of MLA's expanded form (2.1.1, eq. 3 to 10), from before the rotation.

    q [B, T, H, nope + rope]; kv [B, T, H, nope + dv] (each head's own key, then its value); k_rope [B, T, rope], the
    rotary key that all heads share; cos, sin [B or 1, T, rope / 2] float32. The last `rope` of a query and k_rope are
    rotated as `rotate` does. Returns [B, T, H, dv].
    """
    nope = q.shape[-1] - k_rope.shape[-1]
    q_nope, q_rope = q.split([nope, k_rope.shape[-1]], dim=-1)
    k_nope, v = kv.split([nope, kv.shape[-1] - nope], dim=-1)
    q_rope = rotate(q_rope, cos, sin, interleave)
    k_rope = rotate(k_rope.unsqueeze(-2), cos, sin, interleave)
    q = torch.cat((q_nope, q_rope), dim=-1)
    k = torch.cat((k_nope, k_rope.expand_as(q_rope)), dim=-1)  # eq. 4: one k_R for all heads
    return causal_attention(q, k, v, scale)
