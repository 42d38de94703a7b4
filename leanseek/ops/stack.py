"""A whole network over a step's new tokens as one call: at 20 ms a token, ten dispatched ops a layer show."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from leanseek.ops.dispatch import op
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


@dataclass(frozen=True, eq=False)
class Join:
    """How an MTP module begins (eq. 21)."""

    enorm: Norm
    hnorm: Norm
    proj: Packed  # eh_proj, of [enorm(embedding); hnorm(hidden)]


@dataclass(frozen=True, eq=False)
class StackWeights:
    """What a step runs from tokens to the last norm: the main network, or an MTP module."""

    embedding: Tensor  # [vocab_size, D] float32 or BF16
    inv_freq: Tensor  # [rope / 2] float32
    rotary_scale: float
    join: Join | None
    blocks: tuple[BlockWeights, ...]
    norm: Norm


@op("stack_step")
def stack_step(
    weights: StackWeights, tokens: Tensor, hidden: Tensor | None, cache: Tensor, index: CacheIndex
) -> Tensor | None:
    """tokens [N] (and an MTP module's hidden [N, D]) -> [N, D] after the last norm, in the embedding's dtype.

    The blocks' latents are written into cache [blocks or more, slots, W]. None where nothing computes all of it in one
    call on these tensors: then it goes op by op.
    """
    return None
