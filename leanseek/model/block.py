"""One Transformer block: attention and feed-forward, each behind an RMSNorm and around a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanseek import ops
from leanseek.config import ModelConfig
from leanseek.model.attention import GQA, MLA
from leanseek.model.layers import MLP, RMSNorm, release_weights
from leanseek.model.moe import MoE, Route


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.self_attn = (MLA if config.attention == "mla" else GQA)(config, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.mlp: MoE | MLP
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, layer, device, dtype)
        else:
            self.mlp = MLP(config, config.intermediate_size, device, dtype)

    def _feed_forward(self, x: Tensor, replay: Tensor | None) -> tuple[Tensor, Route | None]:
        out, route = self._mlp(self.post_attention_layernorm(x), replay)
        return x + out, route

    def _mlp(self, normed: Tensor, replay: Tensor | None) -> tuple[Tensor, Route | None]:
        return self.mlp(normed, replay) if isinstance(self.mlp, MoE) else (self.mlp(normed), None)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, recompute: bool = False, replay: Tensor | None = None
    ) -> tuple[Tensor, Route | None]:
        """x [B, T, D] -> ([B, T, D], the layer's route if it has experts)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, recompute)
        return self._feed_forward(x, replay)

    def freeze(self, place: ops.Place) -> ops.BlockWeights | None:
        """As Transformer.freeze; None where nothing can be packed."""
        attention, mlp = self.self_attn, self.mlp
        if isinstance(attention, GQA) or not ops.can_pack(attention.kv_b_proj.weight):
            return None
        c, dense = attention.config, mlp.shared_experts if isinstance(mlp, MoE) else mlp
        kv_b = attention.kv_b_proj
        w_uk, w_uv = ops.pack_heads(kv_b.weight.data, kv_b.weight_scale_inv, c.num_attention_heads, c.qk_nope_head_dim)
        frozen = ops.BlockWeights(
            q_a=None if c.q_lora_rank is None else attention.q_a_proj.pack(place),
            q_b=(attention.q_proj if c.q_lora_rank is None else attention.q_b_proj).pack(place),
            kv_a=attention.kv_a_proj_with_mqa.pack(place),
            w_uk=w_uk,
            w_uv=w_uv,
            o=attention.o_proj.pack(place),
            input_norm=self.input_layernorm.stored(),
            q_norm=None if c.q_lora_rank is None else attention.q_a_layernorm.stored(),
            kv_norm=attention.kv_a_layernorm.stored(),
            post_norm=self.post_attention_layernorm.stored(),
            router=mlp.pack(place) if isinstance(mlp, MoE) else None,
            mlp=None if dense is None else dense.pack(place),
            heads=c.num_attention_heads,
            nope=c.qk_nope_head_dim,
            rope=c.qk_rope_head_dim,
            v=c.v_head_dim,
            softmax_scale=c.softmax_scale,
            interleave=c.rope_interleave,
        )
        if place is not ops.Place.APART:
            release_weights(self)
        return frozen

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        """x [N, D] of a step's new tokens, cache [slots, W] of this layer -> [N, D]."""
        x = x + self.self_attn.step(self.input_layernorm(x), cos, sin, cache, index)
        return self._feed_forward(x, None)[0]
