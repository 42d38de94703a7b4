"""The native kernels over weights packed into panels: a step is one call (native/step.py). CPU, MLA.

Whether all of a network can be packed is asked first (`refusal`); what is packed then runs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from leanseek.backends.protocol import Trace
from leanseek.config import ModelConfig
from leanseek.model.attention import LATENT_NORM_EPS
from leanseek.model.rope import Rotary
from leanseek.native import panels
from leanseek.native.library import DTYPES
from leanseek.native.panels import Matrix, Panels, Place, matrix
from leanseek.native.step import BlockPlan, NormPlan, Stack
from leanseek.ops import INT8_ROWS, CacheIndex, QuantizedWeight, StoredWeight
from leanseek.ops.formats import TILE

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
        if name.endswith("experts.gate_up_proj") and config.moe_intermediate_size % TILE:
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
        packing, rotary = _Packing(config, weights, place), Rotary(config)
        embedding = packing.tensor(EMBEDDING)
        self.dtype = embedding.dtype
        layers, eps = config.num_hidden_layers, config.rms_norm_eps
        stack = functools.partial(Stack, embedding, rotary.inv_freq, rotary.scale)
        blocks = [packing.block(f"layers.{layer}.", layer) for layer in range(layers)]
        self._stacks = [stack(blocks, packing.norm("norm.weight", eps))]
        for depth in range(config.num_nextn_predict_layers):
            module = f"mtp.{depth}."
            blocks, norm = [packing.block(f"{module}block.", layers + depth)], packing.norm(f"{module}norm.weight", eps)
            self._stacks.append(stack(blocks, norm, packing.join(module)))
        self._head = panels.pack(weights.pop(HEAD), place) if HEAD in weights else panels.pack(embedding)
        self._kept = [rotary, packing.kept]  # what the stacks' plans point to

    def step(self, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Tensor:
        return self._stacks[0].step(tokens, None, cache, index)

    def step_ahead(self, depth: int, hidden: Tensor, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Tensor:
        layer = self.config.num_hidden_layers + depth - 1
        return self._stacks[depth].step(tokens, hidden, cache[layer:], index)

    def trace(self, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Trace:
        c, layers, n = self.config, self.config.num_hidden_layers, len(tokens)
        states = torch.empty(layers + 1, n, c.hidden_size)
        routes = torch.empty(layers, n, c.num_experts_per_tok, dtype=torch.int64)
        hidden = self._stacks[0].step(tokens, None, cache, index, states, routes)
        return Trace(states, routes, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return panels.linear(hidden, self._head, torch.float32)


class _Packing:
    """Takes weights out by name and lays them out for the kernel; `kept` is what the plans point to."""

    def __init__(self, config: ModelConfig, weights: dict[str, StoredWeight], place: Place):
        self._config, self._weights, self._place = config, weights, place
        self.kept: list[Tensor | Panels] = []

    def tensor(self, name: str) -> Tensor:
        weight = self._weights.pop(name)
        assert isinstance(weight, Tensor), name
        self.kept.append(weight)
        return weight

    def norm(self, name: str, eps: float) -> NormPlan:
        weight = self.tensor(name)
        return NormPlan(DTYPES[weight.dtype], weight.data_ptr(), eps)

    def _matrix(self, name: str) -> Matrix:
        return self._held(panels.pack(self._weights.pop(name), self._place))

    def _held(self, packed: Panels) -> Matrix:
        self.kept.append(packed)
        return matrix(packed)

    def join(self, module: str) -> tuple[NormPlan, NormPlan, Matrix]:
        enorm, hnorm = (self.norm(f"{module}{name}.weight", self._config.rms_norm_eps) for name in ("enorm", "hnorm"))
        return enorm, hnorm, self._matrix(f"{module}eh_proj.weight")

    def block(self, prefix: str, layer: int) -> BlockPlan:
        c = self._config
        plan = BlockPlan(
            heads=c.num_attention_heads,
            nope=c.qk_nope_head_dim,
            rope=c.qk_rope_head_dim,
            v=c.v_head_dim,
            interleave=c.rope_interleave,
            groups=1,
            softmax_scale=c.softmax_scale,
        )
        plan.input_norm = self.norm(f"{prefix}input_layernorm.weight", c.rms_norm_eps)
        self._attention(plan, f"{prefix}self_attn.")
        plan.post_norm = self.norm(f"{prefix}post_attention_layernorm.weight", c.rms_norm_eps)
        if c.is_moe_layer(layer):
            self._experts(plan, f"{prefix}mlp.")
            if c.n_shared_experts:
                self._mlp(plan, f"{prefix}mlp.shared_experts.")
        else:
            self._mlp(plan, f"{prefix}mlp.")
        return plan

    def _attention(self, plan: BlockPlan, prefix: str) -> None:
        c = self._config
        if c.q_lora_rank is None:
            plan.q_b = self._matrix(f"{prefix}q_proj.weight")
        else:
            plan.q_a, plan.q_b = (self._matrix(f"{prefix}{name}.weight") for name in ("q_a_proj", "q_b_proj"))
            plan.q_norm = self.norm(f"{prefix}q_a_layernorm.weight", LATENT_NORM_EPS)
        plan.kv_a = self._matrix(f"{prefix}kv_a_proj_with_mqa.weight")
        plan.kv_norm = self.norm(f"{prefix}kv_a_layernorm.weight", LATENT_NORM_EPS)
        kv_b = self._weights.pop(f"{prefix}kv_b_proj.weight")
        plan.w_uk, plan.w_uv = map(self._held, panels.pack_heads(kv_b, c.num_attention_heads, c.qk_nope_head_dim))
        plan.o = self._matrix(f"{prefix}o_proj.weight")

    def _experts(self, plan: BlockPlan, prefix: str) -> None:
        c = self._config
        plan.gate = self._held(panels.pack(self._weights.pop(f"{prefix}gate.weight")))
        if c.selection_bias:
            plan.bias = self.tensor(f"{prefix}gate.e_score_correction_bias").data_ptr()
        plan.gated = self._held(
            panels.pack_gated_stack(self._weights.pop(f"{prefix}experts.gate_up_proj"), self._place)
        )
        plan.down = self._matrix(f"{prefix}experts.down_proj")
        plan.experts, plan.top_k = c.n_routed_experts, c.num_experts_per_tok
        if c.grouped_routing:
            plan.groups, plan.topk_group = c.n_group, c.topk_group
        else:
            plan.groups = plan.topk_group = 1
        plan.group_best = 2 if c.selection_bias else 1  # experts whose sum is a group's score
        plan.softmax, plan.norm_topk = c.scoring_func == "softmax", c.norm_topk_prob
        plan.routed_scaling_factor = c.routed_scaling_factor

    def _mlp(self, plan: BlockPlan, prefix: str) -> None:
        gate, up = (self._weights.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up"))
        plan.mlp_gated = self._held(panels.pack_gated(gate, up))
        plan.mlp_down = self._matrix(f"{prefix}down_proj.weight")
