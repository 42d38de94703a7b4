"""A decode or prefill step as one native call; its plan is laid out once."""

from __future__ import annotations

import ctypes
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from leanseek import ops
from leanseek.native.library import DTYPES, implements, kernel, pointers
from leanseek.native.packed import Matrix, matrix
from leanseek.ops.dispatch import Rows
from leanseek.ops.latent_attention import CacheIndex
from leanseek.ops.stack import BlockWeights, Norm, StackWeights

_step = kernel("stack_step", "ppp npnn pppp nnn p")

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


_PLANS: WeakKeyDictionary[StackWeights, _Stack] = WeakKeyDictionary()


def _stack(w: StackWeights) -> _Stack:
    blocks = (_Block * len(w.blocks))(*map(_block, w.blocks))  # ctypes keeps what a field points to
    plan = _Stack(DTYPES[w.embedding.dtype], *pointers(w.embedding, w.inv_freq), w.rotary_scale)
    plan.blocks, plan.count, plan.norm = blocks, len(blocks), _norm(w.norm)
    if w.join is not None:
        plan.join, plan.enorm, plan.hnorm = matrix(w.join.proj), _norm(w.join.enorm), _norm(w.join.hnorm)
    return plan


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


def _serves(weights: StackWeights, tokens: Tensor, hidden: object, cache: Tensor, index: CacheIndex) -> bool:
    embedding = weights.embedding
    kinds = embedding.dtype in DTYPES and cache.dtype in DTYPES
    return embedding.device.type == "cpu" and kinds and cache[0].is_contiguous() and not torch.is_grad_enabled()


@implements(ops.stack_step, _serves, Rows.BOTH)
def stack_step(
    weights: StackWeights, tokens: Tensor, hidden: Tensor | None, cache: Tensor, index: CacheIndex
) -> Tensor:
    plan = _PLANS.get(weights)
    if plan is None:
        plan = _PLANS[weights] = _stack(weights)
    hidden = None if hidden is None else hidden.contiguous()
    pages, out = index.pages.contiguous(), weights.embedding.new_empty(len(tokens), weights.embedding.shape[1])
    _step(
        ctypes.addressof(plan), *pointers(tokens, hidden), DTYPES[cache.dtype], cache.data_ptr(), cache.stride(0),
        index.page_size, *pointers(index.positions, index.slots, index.row_offsets, pages), len(tokens), *pages.shape,
        out.data_ptr(),
    )  # fmt: skip
    return out
