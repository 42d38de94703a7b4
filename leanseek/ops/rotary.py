"""RoPE: rotation of pairs by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.ops.dispatch import op


@op("rotate")
def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """Rotate each pair of x's last dimension.

    x [..., H, R]; cos, sin [..., R / 2] float32 (broadcast over the heads). Pairs are (2i, 2i+1) with `interleave`,
    as the published DeepSeek weights need, else (i, i + R/2). The result holds all first halves, then all second
    halves: q·k does not see the order as long as both sides use the same.
    """
    wide = x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleave else wide.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
