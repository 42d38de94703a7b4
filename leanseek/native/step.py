"""A step of a whole network over its new tokens as one native call: at 20 ms a token, ten dispatched ops a layer show.

The plan that the kernel reads is laid out once. Row-invariant, as its products and its attention are.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from leanseek.native.library import DTYPES, kernel, pointers
from leanseek.native.panels import Matrix
from leanseek.ops.latent_attention import CacheIndex

_step = kernel("stack_step", "ppp npnn pppp nnn p ppn")


_n, _p, _d = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class NormPlan(ctypes.Structure):  # stack.cpp: Norm
    _fields_ = [("type", _n), ("weight", _p), ("eps", _d)]


class BlockPlan(ctypes.Structure):  # stack.cpp: BlockPlan; zero where the block lacks a part, q_b is q_proj without q_a
    _fields_ = [
        *((name, Matrix) for name in ("q_a", "q_b", "kv_a", "o", "w_uk", "w_uv", "gate", "gated", "down")),
        *((name, Matrix) for name in ("mlp_gated", "mlp_down")),
        *((name, NormPlan) for name in ("input_norm", "q_norm", "kv_norm", "post_norm")),
        ("bias", _p),
        *((name, _n) for name in ("heads", "nope", "rope", "v", "interleave")),
        *((name, _n) for name in ("experts", "top_k", "groups", "topk_group", "group_best", "softmax", "norm_topk")),
        ("softmax_scale", _d),
        ("routed_scaling_factor", _d),
    ]


class StackPlan(ctypes.Structure):  # stack.cpp: StackPlan
    _fields_ = [
        ("type", _n),
        ("embedding", _p),
        ("inv_freq", _p),
        ("rotary_scale", _d),
        ("join", Matrix),
        *((name, NormPlan) for name in ("enorm", "hnorm", "norm")),
        ("blocks", ctypes.POINTER(BlockPlan)),
        ("count", _n),
    ]


class Stack:
    """The plan of a network's steps, or an MTP module's. Whoever makes it keeps alive what it points to."""

    def __init__(
        self,
        embedding: Tensor,  # [vocab_size, D] float32 or BF16
        inv_freq: Tensor,  # [rope / 2] float32
        rotary_scale: float,
        blocks: list[BlockPlan],
        norm: NormPlan,
        join: tuple[NormPlan, NormPlan, Matrix] | None = None,  # enorm, hnorm, eh_proj of an MTP module (eq. 21)
    ):
        self._embedding = embedding
        self.plan = plan = StackPlan(DTYPES[embedding.dtype], *pointers(embedding, inv_freq), rotary_scale)
        plan.blocks, plan.count, plan.norm = (BlockPlan * len(blocks))(*blocks), len(blocks), norm
        if join is not None:
            plan.enorm, plan.hnorm, plan.join = join

    def step(
        self,
        tokens: Tensor,
        hidden: Tensor | None,
        cache: Tensor,
        index: CacheIndex,
        states: Tensor | None = None,
        routes: Tensor | None = None,
    ) -> Tensor:
        """tokens [N] (and an MTP module's hidden [N, D]) -> [N, D] after the last norm, in the embedding's dtype.

        The blocks' latents are written into cache [blocks or more, slots, W]. Where they are given, states [blocks + 1,
        N, D] float32 take what each block begins with and what the last one ends with, and routes [blocks, N, K] int64
        the experts chosen.

        Raises:
            ValueError: the cache is of another dtype, or its rows do not follow each other.
        """
        embedding = self._embedding
        if cache.dtype not in DTYPES or cache.stride()[1:] != (cache.shape[2], 1):
            raise ValueError(f"a cache of {cache.dtype} with strides {cache.stride()} is not one that kernels read")
        if hidden is not None:
            hidden = hidden.to(embedding.dtype).contiguous()
        pages, out = index.pages.contiguous(), embedding.new_empty(len(tokens), embedding.shape[1])
        _step(
            ctypes.addressof(self.plan), *pointers(tokens, hidden), DTYPES[cache.dtype], cache.data_ptr(),
            cache.stride(0), index.page_size, *pointers(index.positions, index.slots, index.row_offsets, pages),
            len(tokens), *pages.shape, *pointers(out, states, routes), 0 if routes is None else routes.shape[2],
        )  # fmt: skip
        return out
