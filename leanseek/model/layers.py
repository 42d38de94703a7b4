"""The small modules everything else is made of. Weights are left uninitialised: a 671B model is never filled twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanseek import ops
from leanseek.config import ModelConfig


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, size: int, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size, device=device, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Linear(nn.Module):
    """Linear without bias. A quantised weight may take the place of the parameter, for inference.

    high_precision: its products are never in FP8, not in training either (3.3.1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
        high_precision: bool = False,
    ):
        super().__init__()
        self.high_precision = high_precision
        self.weight: nn.Parameter | ops.QuantizedWeight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)


class Head(Linear):
    """The output head: logits, or, given targets, their loss without ever holding the logits of all tokens."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(hidden)
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight.dense(hidden.dtype)
        return next_token_loss(hidden, weight, targets, weights)


def next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross entropy, float32 scalar, of hidden [..., D], head [V, D] and targets [...] int64: the mean, or with weights
    [...] float32 the weighted sum."""
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if weights is None:
        return ops.linear_cross_entropy(hidden, head, targets)
    counted = weights.flatten().nonzero().squeeze(1)  # logits of the others would be thrown away
    taken = (x.index_select(0, counted) for x in (hidden, targets, weights.flatten()))
    hidden, targets, weights = taken
    return ops.linear_cross_entropy(hidden, head, targets, weights)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate x) · up x)."""

    def __init__(self, config: ModelConfig, size: int, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, size, device, dtype)
        self.up_proj = Linear(config.hidden_size, size, device, dtype)
        self.down_proj = Linear(size, config.hidden_size, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
