"""The native kernels over weights packed into panels: a step is one call (native/step.py). CPU, MLA.

Whether all of a network can be packed is asked first (`refusal`); what is packed then runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.config import ModelConfig
from leanseek.model.attention import LATENT_NORM_EPS
from leanseek.model.rope import Rotary
from leanseek.native import panels
from leanseek.native.library import DTYPES
from leanseek.native.panels import Panels, Place
from leanseek.native.step import BlockWeights, Join, Norm, Router, Stack, StackWeights
from leanseek.ops import INT8_ROWS, CacheIndex, QuantizedWeight, StoredWeight
from leanseek.ops.weights import BLOCK

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"  # the latter absent where it is the embedding


def refusal(config: ModelConfig, weights: dict[str, StoredWeight]) -> str:
    """Why kernels cannot run this network, in a line; empty where they can."""
    if reason := panels.refusal():
        return reason
    if config.attention != "mla":
        return f"kernels compute latent attention; this network has attention = {config.attention!r}"
    for name, weight in weights.items():
        if reason := _refused(config, name, weight):
            return f"{name}: {reason}"
        if name.endswith(".gate_proj.weight") and _form(weight) != _form(weights[_up(name)]):
            return f"{name} and up_proj.weight are stored in different forms"
    return ""


def _refused(config: ModelConfig, name: str, weight: StoredWeight) -> str:
    if isinstance(weight, Tensor) and (weight.ndim < 2 or name == EMBEDDING):
        read = weight.device.type == "cpu" and weight.dtype in DTYPES and weight.is_contiguous()
        return "" if read else f"kernels do not read {weight.dtype} on {weight.device.type}"
    if isinstance(weight, QuantizedWeight):
        if name == EMBEDDING or (weight.format == INT8_ROWS and name != HEAD):
            return f"kernels do not read {weight.format.name} here"
        if name.endswith("experts.gate_up_proj") and config.moe_intermediate_size % BLOCK:
            return "a block lies across gate and up"
    return panels.refusal(weight)


def _form(weight: StoredWeight) -> object:
    return weight.format if isinstance(weight, QuantizedWeight) else weight.dtype


def _up(gate: str) -> str:
    return gate.removesuffix("gate_proj.weight") + "up_proj.weight"


class PanelBackend:
    """As StepBackend, for weights that are not refused.

    weights: by their names in the model. They are taken out as they are packed, so that the memory of those packed
    apart is free again; with a place other than APART the memory of the others holds panels from then on, and a model
    that shares it is spoilt.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, StoredWeight], place: Place = Place.APART):
        self.config = config
        self.device = torch.device("cpu")
        packing = _Packing(config, weights, place)
        embedding = self._embedding = packing.tensor(EMBEDDING)
        self.dtype = embedding.dtype
        self._rotary = Rotary(config)
        layers = config.num_hidden_layers
        blocks = tuple(packing.block(f"layers.{layer}.", layer) for layer in range(layers))
        self._stacks = [self._stack(None, blocks, packing.norm("norm.weight", config.rms_norm_eps))]
        for depth in range(config.num_nextn_predict_layers):
            ahead = (packing.block(f"mtp.{depth}.block.", layers + depth),)
            norm = packing.norm(f"mtp.{depth}.norm.weight", config.rms_norm_eps)
            self._stacks.append(self._stack(packing.join(f"mtp.{depth}."), ahead, norm))
        self._head = packing.panels(HEAD) if HEAD in weights else panels.pack(embedding)

    def _stack(self, join: Join | None, blocks: tuple[BlockWeights, ...], norm: Norm) -> Stack:
        rotary = self._rotary
        return Stack(StackWeights(self._embedding, rotary.inv_freq, rotary.scale, join, blocks, norm))

    def step(self, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Tensor:
        return self._stacks[0].step(tokens, None, cache, index)

    def step_ahead(self, depth: int, hidden: Tensor, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Tensor:
        layer = self.config.num_hidden_layers + depth - 1
        return self._stacks[depth].step(tokens, hidden, cache[layer:], index)

    def logits(self, hidden: Tensor) -> Tensor:
        return panels.linear(hidden, self._head, torch.float32)


class _Packing:
    """Takes weights out by name and packs them."""

    def __init__(self, config: ModelConfig, weights: dict[str, StoredWeight], place: Place):
        self._config, self._weights, self._place = config, weights, place

    def tensor(self, name: str) -> Tensor:
        weight = self._weights.pop(name)
        assert isinstance(weight, Tensor), name
        return weight.data

    def norm(self, name: str, eps: float) -> Norm:
        return Norm(self.tensor(name), eps)

    def panels(self, name: str) -> Panels:
        return panels.pack(self._weights.pop(name), self._place)

    def join(self, prefix: str) -> Join:
        eps = self._config.rms_norm_eps
        enorm, hnorm = (self.norm(f"{prefix}{name}.weight", eps) for name in ("enorm", "hnorm"))
        return Join(enorm, hnorm, self.panels(f"{prefix}eh_proj.weight"))

    def block(self, prefix: str, layer: int) -> BlockWeights:
        c, attention = self._config, f"{prefix}self_attn."
        low_rank = c.q_lora_rank is not None
        kv_b = self._weights.pop(f"{attention}kv_b_proj.weight")
        w_uk, w_uv = panels.pack_heads(kv_b, c.num_attention_heads, c.qk_nope_head_dim)
        moe = c.is_moe_layer(layer)
        return BlockWeights(
            q_a=self.panels(f"{attention}q_a_proj.weight") if low_rank else None,
            q_b=self.panels(f"{attention}{'q_b_proj' if low_rank else 'q_proj'}.weight"),
            kv_a=self.panels(f"{attention}kv_a_proj_with_mqa.weight"),
            w_uk=w_uk,
            w_uv=w_uv,
            o=self.panels(f"{attention}o_proj.weight"),
            input_norm=self.norm(f"{prefix}input_layernorm.weight", c.rms_norm_eps),
            q_norm=self.norm(f"{attention}q_a_layernorm.weight", LATENT_NORM_EPS) if low_rank else None,
            kv_norm=self.norm(f"{attention}kv_a_layernorm.weight", LATENT_NORM_EPS),
            post_norm=self.norm(f"{prefix}post_attention_layernorm.weight", c.rms_norm_eps),
            router=self._router(f"{prefix}mlp.") if moe else None,
            mlp=self._mlp(f"{prefix}mlp.{'shared_experts.' * moe}") if c.n_shared_experts or not moe else None,
            heads=c.num_attention_heads,
            nope=c.qk_nope_head_dim,
            rope=c.qk_rope_head_dim,
            v=c.v_head_dim,
            softmax_scale=c.softmax_scale,
            interleave=c.rope_interleave,
        )

    def _router(self, prefix: str) -> Router:
        c = self._config
        return Router(
            panels.pack(self.tensor(f"{prefix}gate.weight")),
            self.tensor(f"{prefix}gate.e_score_correction_bias") if c.selection_bias else None,
            panels.pack_gated_stack(self._weights.pop(f"{prefix}experts.gate_up_proj"), self._place),
            self.panels(f"{prefix}experts.down_proj"),
            top_k=c.num_experts_per_tok,
            n_group=c.n_group if c.grouped_routing else 1,
            topk_group=c.topk_group if c.grouped_routing else 1,
            group_best=2 if c.selection_bias else 1,
            scoring_func=c.scoring_func,
            norm_topk_prob=c.norm_topk_prob,
            routed_scaling_factor=c.routed_scaling_factor,
        )

    def _mlp(self, prefix: str) -> tuple[Panels, Panels]:
        gate, up = (self._weights.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up"))
        return panels.pack_gated(gate, up), self.panels(f"{prefix}down_proj.weight")
