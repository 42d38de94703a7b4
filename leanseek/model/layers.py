"""The small modules everything else is made of. Weights are left uninitialised: a 671B model is never filled twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanseek import fp8, ops
from leanseek.config import ModelConfig
from leanseek.ops.stack import Norm


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, size: int, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size, device=device, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Linear(nn.Module):
    """Linear without bias. The weight may be FP8 blocks or 8-bit rows with their scales, for inference only."""

    weight_scale_inv: Tensor | None

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_buffer("weight_scale_inv", None)
        self.fp8: fp8.Cast | None = None  # set by fp8.apply for training

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not None:
            return fp8.linear(x, self.weight, self.fp8)
        return ops.linear(x, self.weight, self.weight_scale_inv)

    def pack(self, place: ops.Place) -> ops.Packed:
        return ops.pack(self.weight.data, self.weight_scale_inv, place)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`, dequantised if need be."""
        return ops.dense(self.weight, self.weight_scale_inv, dtype)


class Head(Linear):
    """The output head: logits, or, given targets, their loss without ever holding the logits of all tokens."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(hidden) if targets is None else next_token_loss(hidden, self.weight, targets)


def next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, float32 scalar, of hidden [..., D], head [V, D] and targets [...] int64."""
    return ops.linear_cross_entropy(hidden.flatten(0, -2), head, targets.flatten())


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def stored(self) -> Norm:
        return Norm(self.weight.data, self.eps)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate x) · up x)."""

    def __init__(self, config: ModelConfig, size: int, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, size, device, dtype)
        self.up_proj = Linear(config.hidden_size, size, device, dtype)
        self.down_proj = Linear(size, config.hidden_size, device, dtype)
        self.fp8: fp8.Cast | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not None:
            return fp8.mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, self.fp8)
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))

    def pack(self, place: ops.Place) -> tuple[ops.Packed, ops.Packed]:
        gate, up = self.gate_proj, self.up_proj
        scales = (gate.weight_scale_inv, up.weight_scale_inv)
        both = None if scales[0] is None or scales[1] is None else (scales[0], scales[1])
        return ops.pack_gated(gate.weight.data, up.weight.data, both), self.down_proj.pack(place)


def release_weights(module: nn.Module) -> None:
    """Give the memory of the matrices within `module` back: something else holds their values."""
    for inner in module.modules():
        for name, parameter in list(inner.named_parameters(recurse=False)):
            if parameter.ndim > 1:
                setattr(inner, name, nn.Parameter(parameter.data.to("meta"), requires_grad=False))
                if getattr(inner, f"{name}_scale_inv", None) is not None:
                    setattr(inner, f"{name}_scale_inv", None)
