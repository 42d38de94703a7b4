"""A whole Transformer block over a step's new tokens as one call: at 20 ms a token, ten dispatched ops a layer show."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from leanseek.ops.dispatch import pick
from leanseek.ops.latent_attention import CacheIndex
from leanseek.ops.packed import Packed


@dataclass(frozen=True, eq=False)
class Norm:
    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Router:
    """The gate and the routed experts."""

    weight: Packed  # [E, D]
    bias: Tensor | None  # [E] float32
    gated: Packed  # of pack_gated, [E, 2I, D]
    down: Packed  # [E, D, I]
    top_k: int
    n_group: int
    topk_group: int
    group_best: int  # experts whose sum is a group's score
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """What a block of MLA and SwiGLU experts or a dense layer computes with, packed."""

    q_a: Packed | None  # None: q_b is q_proj
    q_b: Packed
    kv_a: Packed
    w_uk: Packed  # of pack_heads, [H, kv_lora_rank, nope]
    w_uv: Packed  # [H, v, kv_lora_rank]
    o: Packed
    input_norm: Norm
    q_norm: Norm | None
    kv_norm: Norm
    post_norm: Norm
    router: Router | None
    mlp: tuple[Packed, Packed] | None  # gate with up, and down, of the shared experts or of the dense layer
    heads: int
    nope: int  # qk_nope_head_dim
    rope: int  # qk_rope_head_dim
    v: int  # v_head_dim
    softmax_scale: float
    interleave: bool


def block_step(
    weights: BlockWeights, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: CacheIndex
) -> Tensor | None:
    """The block's output [N, D] for x [N, D], its latents written into cache [slots, W].

    None where nothing computes a block in one call on these tensors: then it goes op by op.
    """
    return pick("block_step", _op_by_op, x, cache)(weights, x, cos, sin, cache, index)


def _op_by_op(
    weights: BlockWeights, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: CacheIndex
) -> Tensor | None:
    return None
