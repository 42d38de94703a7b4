"""A network whose linears and experts train in FP8: modules give their place to ones that multiply in FP8 (3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from leanseek.fp8 import layers
from leanseek.fp8.memory import Recomputed
from leanseek.fp8.recipe import Cast, GradientBlocks, Tensorwise, Tilewise
from leanseek.model import attention, block, moe
from leanseek.model import layers as plain
from leanseek.model.packing import Lengths, Shared
from leanseek.ops import Dispatched
from leanseek.ops.formats import Counts
from leanseek.ops.quantize import round_e5m6

RECIPES: dict[str, type[Tilewise] | None] = {
    "bf16": None, "fp8": Tilewise, "fp8-tensorwise": Tensorwise, "fp8-gradient-blocks": GradientBlocks,
}  # fmt: skip
PRECISIONS = tuple(RECIPES)


class Linear(plain.Linear):
    weight: nn.Parameter
    cast: Cast

    def forward(self, x: Tensor) -> Tensor:
        return layers.linear(x, self.weight, self.cast)


class MLP(plain.MLP):
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    cast: Cast

    def forward(self, x: Tensor) -> Tensor:
        return layers.mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, self.cast)


class Experts(moe.Experts):
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    cast: Cast

    def products(self, sent: Dispatched) -> Tensor:
        return layers.expert_products(sent, self.gate_up_proj, self.down_proj, self.cast)


class MLA(attention.MLA):
    """Keeps the latents alone (3.2.3)."""

    def _attend(
        self,
        q_latent: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        recompute: bool,
        lengths: Lengths | Shared | None,
    ) -> Tensor:
        held = q_latent.detach(), latent.detach()
        q, kv = self._query(q_latent, recompute), self._keys_values(latent, recompute)
        with Recomputed((q, lambda: self._query(held[0])), (kv, lambda: self._keys_values(held[1]))):
            return attention.by_sample(self._mix, lengths, q, kv, k_rope, cos, sin)

    def _mix(self, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = super()._mix(q, kv, k_rope, cos, sin)
        # the attention's backward reads its output too (3.3.3): one tensor, rounded, serves it and W_O
        out.data.copy_(round_e5m6(out.detach()))
        return out


class Block(block.Block):
    def _feed_forward(self, x: Tensor, replay: Tensor | None) -> tuple[Tensor, moe.Route | None]:
        """The gate reads what the FP8 products do not keep: the norm is computed again for it (3.2.3)."""
        held, normed = x.detach(), self.post_attention_layernorm(x)
        with Recomputed((normed, lambda: self.post_attention_layernorm(held))):
            out, route = self._mlp(normed, replay)
        return x + out, route


REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    plain.Linear: Linear, plain.MLP: MLP, moe.Experts: Experts, attention.MLA: MLA, block.Block: Block,
}  # fmt: skip


def apply(model: nn.Module, precision: str) -> None:
    """Linears, feed-forwards and experts of `model` multiply in FP8 from now on; "bf16" restores the original modules.

    A module changes its class and keeps its parameters, names and hooks, as FSDP2 does it. The head, a class of its
    own, and linears made with `high_precision` stay as they are.
    """
    kind = RECIPES[precision]
    recipe = kind() if kind else None
    for module in model.modules():
        own = next((base for base, new in REPLACED.items() if type(module) in (base, new)), None)
        if own is None or (isinstance(module, plain.Linear) and module.high_precision):
            continue
        module.__class__ = REPLACED[own] if recipe else own
        if isinstance(module, Linear | MLP | Experts):
            assert recipe is not None
            module.cast = Cast(recipe)
    for module in model.modules():  # the attention keeps its output anyway
        if isinstance(module, attention.MLA | attention.GQA) and isinstance(module.o_proj, Linear):
            module.o_proj.cast.wide_input = True


def forget(model: nn.Module) -> None:
    """Cast all weights again when they are next read: they have changed, and their versions do not tell."""
    for module in model.modules():
        if isinstance(module, Linear | MLP | Experts):
            module.cast.forget()


def observe(model: nn.Module) -> dict[str, dict[str, Counts]]:
    """Start counting what quantisation loses; the answer fills in as the model runs: module -> tensor -> counts."""
    found: dict[str, dict[str, Counts]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | MLP | Experts):
            module.cast.seen = found[name] = {}
    return found
