"""Multi-token prediction (section 2.2): module k predicts token i + k + 1 from the hidden state of token i."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanseek import ops
from leanseek.config import ModelConfig
from leanseek.model.block import Block
from leanseek.model.layers import Linear, RMSNorm
from leanseek.model.moe import Route
from leanseek.model.packing import Lengths


class MTPModule(nn.Module):
    """One depth k. Embedding and head are the main model's and stay there.

    As published: eh_proj takes [enorm(embedding); hnorm(hidden)] (the reverse of eq. 21), and the hidden state of
    depth k - 1 is taken after its last norm, the main model's `norm` for depth 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        depth: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
        experts: range | None = None,
    ):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(d, eps, device, dtype)
        self.hnorm = RMSNorm(d, eps, device, dtype)
        self.eh_proj = Linear(2 * d, d, device, dtype, high_precision=True)
        self.block = Block(config, config.num_hidden_layers + depth, device, dtype, experts)
        self.norm = RMSNorm(d, eps, device, dtype)

    def _join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))  # eq. 21

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        recompute: bool = False,
        replay: Tensor | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Route | None]:
        """embedded [B, T, D] of tokens i + k, hidden [B, T, D] of depth k - 1 -> (hidden of depth k, route)."""
        out, route = self.block(self._join(embedded, hidden), cos, sin, recompute, replay, lengths)  # eq. 22
        return self.norm(out), route

    def step(
        self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: ops.CacheIndex
    ) -> Tensor:
        """As forward over a step's new tokens, [N, D], with this module's own cache [slots, W]."""
        return self.norm(self.block.step(self._join(embedded, hidden), cos, sin, cache, index)[0])
