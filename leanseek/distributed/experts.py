"""Expert parallelism, put around a model: each rank holds some of the routed experts of every layer (2.1.2, 3.2.2)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from leanseek.distributed.deepep import DeepEP
from leanseek.distributed.exchange import Exchange
from leanseek.model import moe


class MoE(moe.MoE):
    """The gate and the shared experts run here, on this rank's tokens, and the routed experts on what comes."""

    exchange: Exchange | DeepEP

    def forward(self, x: Tensor, replay: Tensor | None = None) -> tuple[Tensor, moe.Route]:
        flat = x.reshape(-1, x.shape[-1])
        route = self.gate(flat, replay)
        sending = self.exchange.dispatch(flat, route.indices, route.weights)
        shared = None if self.shared_experts is None else self.shared_experts(flat)  # while rows travel
        out = sending.combine(self.experts.products(sending.wait())).wait()
        return (out if shared is None else out + shared).view(x.shape), route


def apply(model: nn.Module, exchange: Exchange | DeepEP) -> None:
    """Routed experts of `model`, of which this rank holds its share, serve the tokens of all ranks from now on."""
    for module in model.modules():
        if isinstance(module, moe.MoE):
            module.__class__ = MoE
            cast(MoE, module).exchange = exchange
