"""A step of AdamW with moments in BF16 (3.3.3)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from leanseek.ops.dispatch import op


class AdamW(NamedTuple):
    """What a step needs besides the tensors."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@op("adamw")
def adamw(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rule: AdamW) -> None:
    """Change weight, the BF16 moments and `step` (a number, float32 []) in place. Arithmetic is float32."""
    m, v = exp_avg.float(), exp_avg_sq.float()
    torch_adamw(
        [weight], [grad], [m], [v], [], [step],
        fused=True, amsgrad=False, maximize=False, **rule._asdict(),
    )  # fmt: skip
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
