"""SwiGLU's activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.dispatch import op


@op("swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise. gate, up [..., I]."""
    return F.silu(gate) * up
