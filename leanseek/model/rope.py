"""Rotary positions and their YaRN extension (section 4.3; Peng et al., arXiv 2309.00071)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanseek.config import ModelConfig, YarnConfig


def inverse_frequencies(dim: int, theta: float, yarn: YarnConfig | None = None) -> Tensor:
    """Angle per position of each rotated pair, [dim / 2] float32.

    YaRN leaves fast pairs as they are, divides slow ones by `factor`, and blends on a ramp between the pairs that
    turn `beta_fast` and `beta_slow` times within the original context.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if yarn is None:
        return inv_freq

    def pair_turning(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    width = (high - low) or 0.001  # Kimi-K2 has beta_fast = beta_slow: a ramp of no width is a step
    slow = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return inv_freq / yarn.factor * slow + inv_freq * (1 - slow)


class Rotary(torch.nn.Module):
    """cos and sin of positions. Holds only the frequencies: any position can be asked for, at any length."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None):
        super().__init__()
        self.scale = config.rope_scaling.rotary_scale if config.rope_scaling else 1.0
        inv_freq = inverse_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)
        # On the CPU even when the model is on "meta": frequencies are configuration, not weights.
        on_meta = device is not None and torch.device(device).type == "meta"
        self.register_buffer("inv_freq", inv_freq if on_meta else inv_freq.to(device), persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        exact = self.inv_freq
        super()._apply(fn, recurse)
        # model.bfloat16() must not round the frequencies, nor model.to("meta") lose them
        self.inv_freq = exact if self.inv_freq.is_meta else exact.to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [...] int64 -> cos, sin [..., rope_dim / 2] float32."""
        angles = positions[..., None].float() * self.inv_freq.to(positions.device)  # moved for meta alone
        return angles.cos() * self.scale, angles.sin() * self.scale
