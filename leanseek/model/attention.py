"""Multi-head latent attention (section 2.1.1) in its two forms, and the baselines it is compared with.

Expanded: keys and values of every head are made from the latent; for training and whole sequences.
Absorbed: the up-projections move onto the query and the output, and attention runs on the cached latent itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leanseek import ops
from leanseek.config import ModelConfig
from leanseek.model.layers import Linear, RMSNorm
from leanseek.model.packing import Lengths, Shared
from leanseek.ops.products import wide

# The published code and transformers leave the norms of both latents at this eps whatever rms_norm_eps says
# (it differs for Moonlight and Kimi-K2: 1e-5).
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    def __init__(self, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.config = c = config
        heads = c.num_attention_heads
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, heads * c.qk_head_dim, device, dtype)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, device, dtype)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS, device, dtype)
            self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim, device, dtype)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, device, dtype)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS, device, dtype)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), device, dtype)
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size, device, dtype)

    def _query_latent(self, x: Tensor) -> Tensor:
        """x [..., D] -> W_DQ x before its norm [..., q_lora_rank] (eq. 6); x itself where there is none."""
        return x if self.config.q_lora_rank is None else self.q_a_proj(x)

    def _query(self, latent: Tensor, recompute: bool = False) -> Tensor:
        """`_query_latent`'s result -> [q_C; q_R] of every head before rotation, [..., H, nope + rope] (eq. 7, 8)."""
        c = self.config
        q = self.q_proj(latent) if c.q_lora_rank is None else _up(self.q_a_layernorm, self.q_b_proj, latent, recompute)
        return q.unflatten(-1, (c.num_attention_heads, c.qk_head_dim))

    def _keys_values(self, latent: Tensor, recompute: bool = False) -> Tensor:
        """W_DKV x before its norm -> [k_C; v] of every head, [..., H, nope + v] (eq. 2, 5)."""
        c = self.config
        kv = _up(self.kv_a_layernorm, self.kv_b_proj, latent, recompute)
        return kv.unflatten(-1, (c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim))

    def _compress(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> W_DKV x before its norm [..., kv_lora_rank], k_R before the rotation [..., rope] (eq. 1, 3)."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        return latent, k_rope

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, recompute: bool = False, lengths: Lengths | Shared | None = None
    ) -> Tensor:
        """Expanded form over whole sequences: x [B, T, D], cos and sin [B or 1, T, rope / 2] -> [B, T, D].

        lengths: of the samples in each row, which do not see each other; or how they share rows.
        """
        out = self._attend(self._query_latent(x), *self._compress(x), cos, sin, recompute, lengths)
        return self.o_proj(out.flatten(-2))  # eq. 11

    def _attend(
        self,
        q_latent: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        recompute: bool,
        lengths: Lengths | Shared | None,
    ) -> Tensor:
        """eq. 2 to 10, from what `_query_latent` and `_compress` return -> [B, T, H, v]."""
        q, kv = self._query(q_latent, recompute), self._keys_values(latent, recompute)
        return by_sample(self._mix, lengths, q, kv, k_rope, cos, sin)

    def _mix(self, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.mla_attention(q, kv, k_rope, cos, sin, self.config.softmax_scale, self.config.rope_interleave)

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        """Absorbed form: x [N, D] of the step's new tokens; writes their latents into cache [slots, W] -> [N, D]."""
        c = self.config
        q_nope, q_rope = self._query(self._query_latent(x)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        q_rope = ops.rotate(q_rope, cos, sin, c.rope_interleave)  # eq. 8
        latent, k_rope = self._compress(x)
        k_rope = ops.rotate(k_rope.unsqueeze(-2), cos, sin, c.rope_interleave).squeeze(-2)  # eq. 3
        row = torch.cat((self.kv_a_layernorm(latent), k_rope), dim=-1)
        cache.index_copy_(0, index.slots, row.to(cache.dtype))
        w_uk, w_uv = self._absorbed(x.dtype)
        # q_C · (W_UK c) = (W_UKᵀ q_C) · c
        q = torch.cat((ops.head_linear(q_nope, w_uk), q_rope), dim=-1)  # [N, H, W]
        out = ops.latent_attention(q, cache, index, c.softmax_scale, c.kv_lora_rank)  # [N, H, kv_lora_rank]
        return self.o_proj(ops.head_linear(out, w_uv.transpose(1, 2)).flatten(-2))

    def _absorbed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kv_b_proj as W_UK [H, nope, kv_lora_rank] and W_UV [H, v, kv_lora_rank]."""
        c = self.config
        weight = ops.dense(self.kv_b_proj.weight, dtype).unflatten(0, (c.num_attention_heads, -1))
        w_uk, w_uv = weight.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        return w_uk, w_uv


def by_sample(attend: Callable[..., Tensor], lengths: Lengths | Shared | None, *inputs: Tensor) -> Tensor:
    """`attend` over inputs [B or 1, T, ...], by whole rows; with `lengths` by samples, and zeros in the padding."""
    if lengths is None:
        return attend(*inputs)
    if isinstance(lengths, Shared):
        return lengths.attend(attend, *inputs)
    rows, size = [], inputs[0].shape[1]
    for row, samples in enumerate(lengths):
        padding = size - sum(samples)
        parts = zip(*(x[row : row + 1].split([*samples, padding], dim=1)[:-1] for x in inputs), strict=True)
        row_out = torch.cat([attend(*part) for part in parts], dim=1)
        rows.append(F.pad(row_out, (0, 0, 0, 0, 0, padding)) if padding else row_out)
    return torch.cat(rows)


def _up(norm: RMSNorm, proj: Linear, x: Tensor, recompute: bool) -> Tensor:
    """proj(norm(x)); with `recompute`, backward computes it again instead of keeping norm(x) and the result (3.2.3)."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(lambda latent: proj(norm(latent)), x, use_reentrant=False)
    return proj(norm(x))


class GQA(nn.Module):
    """The baselines: MHA (as many key heads as query heads), GQA (fewer) and MQA (one)."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.config = c = config
        width = c.gqa_head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * width, device, dtype)
        self.k_proj = Linear(c.hidden_size, c.kv_heads * width, device, dtype)
        self.v_proj = Linear(c.hidden_size, c.kv_heads * width, device, dtype)
        self.o_proj = Linear(c.num_attention_heads * width, c.hidden_size, device, dtype)

    def _qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width, interleave = self.config.gqa_head_dim, self.config.rope_interleave
        q, k, v = (proj(x).unflatten(-1, (-1, width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return ops.rotate(q, cos, sin, interleave), ops.rotate(k, cos, sin, interleave), v

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, recompute: bool = False, lengths: Lengths | Shared | None = None
    ) -> Tensor:
        """As MLA.forward; there is no up-projection to recompute."""
        return self.o_proj(by_sample(self._mix, lengths, *self._qkv(x, cos, sin)).flatten(-2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.causal_attention(q, k, v, self.config.softmax_scale)

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        """As MLA.step, over rows of keys then values; plain torch, a sequence at a time: a baseline to compare with."""
        c = self.config
        q, k, v = self._qkv(x, cos, sin)  # [N, heads, width]
        cache.index_copy_(0, index.slots, torch.cat((k.flatten(1), v.flatten(1)), dim=-1).to(cache.dtype))
        out = torch.empty_like(q)
        offsets = index.row_offsets.tolist()
        for sequence, (start, stop) in enumerate(pairwise(offsets)):
            rows = cache[index.rows_of(sequence)].to(x.dtype).unflatten(-1, (2, c.kv_heads, c.gqa_head_dim))
            keys, values = (rows[:, i].repeat_interleave(c.num_attention_heads // c.kv_heads, 1) for i in (0, 1))
            queries, keys, values = wide(q[start:stop], keys, values)
            scores = torch.einsum("nhd,lhd->hnl", queries, keys).float() * c.softmax_scale
            future = torch.arange(rows.shape[0], device=x.device) > index.positions[start:stop, None]
            weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(values.dtype)
            out[start:stop] = torch.einsum("hnl,lhd->nhd", weights, values)
        return self.o_proj(out.flatten(-2))
