"""A step of a whole network over its new tokens as one native call: at 20 ms a token, ten dispatched ops a layer show.

The plan that the kernel reads is laid out once. Row-invariant, as its products and its attention are.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor

from leanseek.native.library import DTYPES, kernel, pointers
from leanseek.native.panels import Matrix, Panels, matrix
from leanseek.ops.latent_attention import CacheIndex

_step = kernel("stack_step", "ppp npnn pppp nnn p")


@dataclass(frozen=True, eq=False)
class Norm:
    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Router:
    """The gate and the routed experts."""

    weight: Panels  # [E, D]
    bias: Tensor | None  # [E] float32
    gated: Panels  # of pack_gated, [E, 2I, D]
    down: Panels  # [E, D, I]
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

    q_a: Panels | None  # None: q_b is q_proj
    q_b: Panels
    kv_a: Panels
    w_uk: Panels  # of pack_heads, [H, kv_lora_rank, nope]
    w_uv: Panels  # [H, v, kv_lora_rank]
    o: Panels
    input_norm: Norm
    q_norm: Norm | None
    kv_norm: Norm
    post_norm: Norm
    router: Router | None
    mlp: tuple[Panels, Panels] | None  # gate with up, and down, of the shared experts or of the dense layer
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
    proj: Panels  # eh_proj, of [enorm(embedding); hnorm(hidden)]


@dataclass(frozen=True, eq=False)
class StackWeights:
    """What a step runs from tokens to the last norm: the main network, or an MTP module."""

    embedding: Tensor  # [vocab_size, D] float32 or BF16
    inv_freq: Tensor  # [rope / 2] float32
    rotary_scale: float
    join: Join | None
    blocks: tuple[BlockWeights, ...]
    norm: Norm


_n, _p, _d = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class _Norm(ctypes.Structure):  # stack.cpp: Norm
    _fields_ = [("type", _n), ("weight", _p), ("eps", _d)]


class _Block(ctypes.Structure):  # stack.cpp: BlockPlan
    _fields_ = [
        *((name, Matrix) for name in ("q_a", "q_b", "kv_a", "o", "w_uk", "w_uv", "gate", "gated", "down")),
        *((name, Matrix) for name in ("mlp_gated", "mlp_down")),
        *((name, _Norm) for name in ("input_norm", "q_norm", "kv_norm", "post_norm")),
        ("bias", _p),
        *((name, _n) for name in ("heads", "nope", "rope", "v", "interleave")),
        *((name, _n) for name in ("experts", "top_k", "groups", "topk_group", "group_best", "softmax", "norm_topk")),
        ("softmax_scale", _d),
        ("routed_scaling_factor", _d),
    ]


class _Stack(ctypes.Structure):  # stack.cpp: StackPlan
    _fields_ = [
        ("type", _n),
        ("embedding", _p),
        ("inv_freq", _p),
        ("rotary_scale", _d),
        ("join", Matrix),
        *((name, _Norm) for name in ("enorm", "hnorm", "norm")),
        ("blocks", ctypes.POINTER(_Block)),
        ("count", _n),
    ]


def _block(w: BlockWeights) -> _Block:
    plan = _Block(heads=w.heads, nope=w.nope, rope=w.rope, v=w.v, interleave=w.interleave, groups=1)
    plan.softmax_scale = w.softmax_scale
    for name in ("q_b", "kv_a", "w_uk", "w_uv", "o"):
        setattr(plan, name, matrix(getattr(w, name)))
    for name in ("input_norm", "kv_norm", "post_norm"):
        setattr(plan, name, _norm(getattr(w, name)))
    if w.q_a is not None and w.q_norm is not None:
        plan.q_a, plan.q_norm = matrix(w.q_a), _norm(w.q_norm)
    if w.mlp is not None:
        plan.mlp_gated, plan.mlp_down = map(matrix, w.mlp)
    if w.router is not None:
        r = w.router
        plan.gate, plan.gated, plan.down = matrix(r.weight), matrix(r.gated), matrix(r.down)
        plan.bias = None if r.bias is None else r.bias.data_ptr()
        plan.experts, plan.top_k = r.weight.rows, r.top_k
        plan.groups, plan.topk_group, plan.group_best = r.n_group, r.topk_group, r.group_best
        plan.softmax, plan.norm_topk = r.scoring_func == "softmax", r.norm_topk_prob
        plan.routed_scaling_factor = r.routed_scaling_factor
    return plan


def _norm(norm: Norm) -> _Norm:
    return _Norm(DTYPES[norm.weight.dtype], norm.weight.data_ptr(), norm.eps)


class Stack:
    """The plan of a stack's steps; it keeps the weights that the kernel reads."""

    def __init__(self, weights: StackWeights):
        w = self.weights = weights
        blocks = (_Block * len(w.blocks))(*map(_block, w.blocks))  # ctypes keeps what a field points to
        plan = self._plan = _Stack(DTYPES[w.embedding.dtype], *pointers(w.embedding, w.inv_freq), w.rotary_scale)
        plan.blocks, plan.count, plan.norm = blocks, len(blocks), _norm(w.norm)
        if w.join is not None:
            plan.join, plan.enorm, plan.hnorm = matrix(w.join.proj), _norm(w.join.enorm), _norm(w.join.hnorm)

    def step(self, tokens: Tensor, hidden: Tensor | None, cache: Tensor, index: CacheIndex) -> Tensor:
        """tokens [N] (and an MTP module's hidden [N, D]) -> [N, D] after the last norm, in the embedding's dtype.

        The blocks' latents are written into cache [blocks or more, slots, W].

        Raises:
            ValueError: the cache is of another dtype, or its rows do not follow each other.
        """
        embedding = self.weights.embedding
        if cache.dtype not in DTYPES or cache.stride()[1:] != (cache.shape[2], 1):
            raise ValueError(f"a cache of {cache.dtype} with strides {cache.stride()} is not one that kernels read")
        if hidden is not None:
            hidden = hidden.to(embedding.dtype).contiguous()
        pages, out = index.pages.contiguous(), embedding.new_empty(len(tokens), embedding.shape[1])
        _step(
            ctypes.addressof(self._plan), *pointers(tokens, hidden), DTYPES[cache.dtype], cache.data_ptr(),
            cache.stride(0), index.page_size, *pointers(index.positions, index.slots, index.row_offsets, pages),
            len(tokens), *pages.shape, out.data_ptr(),
        )  # fmt: skip
        return out
