"""Expert parallelism, put around a model: each rank holds some of the routed experts of every layer (2.1.2, 3.2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.distributed as dist
from torch import Tensor, nn

from leanseek.distributed.exchange import Exchange
from leanseek.model import moe


class MoE(moe.MoE):
    """The gate and the shared experts run here, on this rank's tokens, and the routed experts on what comes."""

    exchange: Exchange

    def forward(self, x: Tensor, replay: Tensor | None = None) -> tuple[Tensor, moe.Route]:
        flat = x.reshape(-1, x.shape[-1])
        route = self.gate(flat, replay)
        sending = self.exchange.dispatch(flat, route.indices, route.weights)
        shared = None if self.shared_experts is None else self.shared_experts(flat)  # while rows travel
        out = sending.combine(self.experts.products(sending.wait())).wait()
        return (out if shared is None else out + shared).view(x.shape), route


def apply(model: nn.Module, groups: Sequence[dist.ProcessGroup], fp8: bool = False) -> None:
    """Routed experts of `model`, of which this rank holds its share, serve the tokens of all ranks from now on.

    groups, fp8: as `Exchange` takes them.
    """
    for name, module in model.named_modules():
        if isinstance(module, moe.MoE):
            layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
            module.__class__ = MoE
            cast(MoE, module).exchange = Exchange(groups, module.gate.weight.shape[0], fp8, layer)
