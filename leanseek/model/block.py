"""One Transformer block: attention and feed-forward, each behind an RMSNorm and around a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanseek import ops
from leanseek.config import ModelConfig
from leanseek.model.attention import GQA, MLA
from leanseek.model.layers import MLP, RMSNorm
from leanseek.model.moe import MoE, Route
from leanseek.model.packing import Lengths, Shared


class Block(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
        experts: range | None = None,
    ):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.self_attn = (MLA if config.attention == "mla" else GQA)(config, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.mlp: MoE | MLP
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, layer, device, dtype, experts)
        else:
            self.mlp = MLP(config, config.intermediate_size, device, dtype)

    def _feed_forward(self, x: Tensor, replay: Tensor | None) -> tuple[Tensor, Route | None]:
        out, route = self._mlp(self.post_attention_layernorm(x), replay)
        return x + out, route

    def _mlp(self, normed: Tensor, replay: Tensor | None) -> tuple[Tensor, Route | None]:
        return self.mlp(normed, replay) if isinstance(self.mlp, MoE) else (self.mlp(normed), None)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        recompute: bool = False,
        replay: Tensor | None = None,
        lengths: Lengths | Shared | None = None,
    ) -> tuple[Tensor, Route | None]:
        """x [B, T, D] -> ([B, T, D], the layer's route if it has experts)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, recompute, lengths)
        return self._feed_forward(x, replay)

    def step(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: ops.CacheIndex
    ) -> tuple[Tensor, Route | None]:
        """x [N, D] of a step's new tokens, cache [slots, W] of this layer -> ([N, D], its route)."""
        x = x + self.self_attn.step(self.input_layernorm(x), cos, sin, cache, index)
        return self._feed_forward(x, None)
