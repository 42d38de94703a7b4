"""The Transformer: the story starts here.

tokens -> embedding -> blocks (attention.py, moe.py) -> norm -> head; MTP modules (mtp.py) go on from the last hidden.
Two ways through: `hidden` over whole sequences (training, evaluation), `step` over new tokens with a cache (serving).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from leanseek import ops
from leanseek.config import ModelConfig
from leanseek.model.block import Block
from leanseek.model.layers import Embedding, Linear, RMSNorm
from leanseek.model.moe import Route
from leanseek.model.mtp import MTPModule
from leanseek.model.rope import Rotary


class Transformer(nn.Module):
    """A network of the DeepSeek-V3 family. Weights are uninitialised until `init_weights` or a checkpoint."""

    def __init__(
        self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device, dtype)
        self.layers = nn.ModuleList(Block(config, i, device, dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, device, dtype)
        )
        self.mtp = nn.ModuleList(MTPModule(config, k, device, dtype) for k in range(config.num_nextn_predict_layers))
        self.rotary = Rotary(config, device)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> Transformer:
        """Normal weights with std `initializer_range` (4.2), norms at one, balancing biases at zero; returns self."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
        for name, buffer in self.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
        return self

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, D]: the output head, which is the embedding when tied."""
        return self.embed_tokens.weight if self.lm_head is None else cast(Tensor, self.lm_head.weight)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] after the final norm -> logits [..., vocab_size]."""
        return ops.linear(hidden, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 -> logits [B, T, vocab_size]."""
        return self.head(self.hidden(tokens)[0])

    def embed(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """tokens [...] -> [..., D]; `dtype` is the activations' from here on, the weights' own when None."""
        embedded = self.embed_tokens(tokens)
        return embedded if dtype is None else embedded.to(dtype)

    def hidden(
        self,
        tokens: Tensor,
        *,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        replay: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, list[Route]]:
        """Whole sequences from position 0: tokens [B, T] -> (hidden [B, T, D] after the final norm, routes).

        dtype: of the activations (BF16 compute over float32 weights). recompute: do not keep norms and MLA
        up-projections for backward. replay: per layer, the experts [N, K] to use instead of the gate's choice.
        """
        x = self.embed(tokens, dtype)
        cos, sin = self.rotary(torch.arange(tokens.shape[1], device=tokens.device)[None])
        routes = []
        for layer, block in enumerate(self.layers):
            x, route = block(x, cos, sin, recompute, (replay or {}).get(layer))
            if route is not None:
                routes.append(route)
        return self.norm(x), routes

    def predict_ahead(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        recompute: bool = False,
        replay: Mapping[int, Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Route]]:
        """MTP hidden states of depths 1 to D (eq. 21, 22), each [B, T, D] after its norm, and their routes.

        hidden [B, T, D] as `hidden` returns it; tokens [B, T + D]: the model's inputs and the D tokens after them.
        The head on depth k's state of token i predicts token i + k + 1 (eq. 23).
        """
        length = hidden.shape[1]
        cos, sin = self.rotary(torch.arange(length, device=tokens.device)[None])
        states, routes = [], []
        for depth, module in enumerate(self.mtp, start=1):
            embedded = self.embed(tokens[:, depth : depth + length], hidden.dtype)
            layer = self.config.num_hidden_layers + depth - 1
            hidden, route = module(embedded, hidden, cos, sin, recompute, (replay or {}).get(layer))
            states.append(hidden)
            if route is not None:
                routes.append(route)
        return states, routes

    def step(self, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        """New tokens of several sequences at once: tokens [N] -> hidden [N, D] after the final norm.

        cache [num_hidden_layers (+ D), slots, cache_width] is read and written in place; MTP modules use the layers
        after the main model's.
        """
        x = self.embed(tokens)
        cos, sin = self.rotary(index.positions)
        for block, layer_cache in zip(self.layers, cache, strict=False):
            x = cast(Block, block).step(x, cos, sin, layer_cache, index)
        return self.norm(x)

    def step_ahead(self, depth: int, hidden: Tensor, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        """MTP module `depth` (from 1) in serving: hidden [N, D] of depth - 1, the tokens [N] after them -> [N, D]."""
        cos, sin = self.rotary(index.positions)
        layer_cache = cache[self.config.num_hidden_layers + depth - 1]
        module = cast(MTPModule, self.mtp[depth - 1])
        return module.step(self.embed(tokens), hidden, cos, sin, layer_cache, index)
