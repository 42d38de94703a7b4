"""AdamW as in section 4.2, with the moments in float32 or, as section 3.3.3 keeps them, in BF16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from leanseek import ops
from leanseek.training.config import OptimizerConfig
from leanseek.training.part import Slice


class BF16AdamW(torch.optim.Optimizer):
    """AdamW whose two moments are stored in BF16 and computed in float32: half the optimizer's memory (3.3.3)."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rule = ops.AdamW(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
                ops.adamw(p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], rule)


def build_optimizer(slices: Mapping[str, Slice], config: OptimizerConfig, moments: str) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone, the head's and the gate's among them.

    Norms scale and do not multiply into each other, so nothing is to be shrunk; the embedding (also when it is the head
    at once) is a table, of which a step touches few rows and decay would wear down the rare ones. The gate's balancing
    bias is no parameter at all. The paper does not say what it decays.
    """
    decay: list[Tensor] = []
    keep: list[Tensor] = []
    for name, (parameter, shape, *_) in slices.items():
        (keep if len(shape) < 2 or name == "embed_tokens.weight" else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if moments == "bfloat16":
        optimizer = BF16AdamW(groups, config.lr, config.betas, config.eps)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer.register_step_post_hook(_changed)
    return optimizer


def _changed(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """torch's fused AdamW leaves the weights' version, by which FP8 knows that a cast is out of date, as it was."""
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


class EMA:
    """Exponential moving average of the weights, float32 (3.2.3: kept aside for an early look at the decayed model)."""

    def __init__(self, slices: Mapping[str, Slice], decay: float):
        self.decay, self.slices = decay, slices
        self.weights = {name: s.parameter.detach().float().clone() for name, s in slices.items()}

    @torch.no_grad()
    def update(self) -> None:
        current = [self.slices[name].parameter.float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - self.decay)
