"""RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.ops.dispatch import op


@op("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32 inside, returned in x's dtype.

    x [..., D]; weight [D].
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide.to(x.dtype) * weight.to(x.dtype)).to(x.dtype)
