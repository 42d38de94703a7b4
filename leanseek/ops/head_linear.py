"""A matrix per head: the absorbed up-projections of MLA (2.1.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.ops.dispatch import op
from leanseek.ops.products import wide


@op("head_linear")
def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, H, K] times weight [H, K, R], head by head: [N, H, R]. Both of one dtype."""
    return torch.einsum("nhk,hkr->nhr", *wide(x, weight)).to(x.dtype)
