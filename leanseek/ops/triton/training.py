"""What a training step asks of these kernels, and where they accept it: FP8's quantisers in the forms that
leanseek/fp8/quantize.py describes, and what is no product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leanseek.ops import triton
from leanseek.ops.adamw import AdamW
from leanseek.ops.dispatch import register

if TYPE_CHECKING:
    from leanseek.ops.grouped import Groups
    from leanseek.ops.triton.quantize import Blocks, Codes

Kept = tuple[Tensor, Tensor]  # codes and scales of what backward reads


def _takes(x: Tensor, fixed: Tensor | None = None) -> bool:
    """One scale for a whole tensor is for the exact arithmetic: it is there to be compared with."""
    return fixed is None and not triton.refusal(x.device)


@register("fp8_stored_blocks", "triton", _takes)
def quantize_blocks(weight: Tensor) -> Kept:
    from leanseek.ops.triton.quantize import quantize_blocks

    codes, scales = quantize_blocks(weight)
    return codes, scales.contiguous()


# ---- the forms of leanseek/fp8/quantize.py ----


@register("fp8_rows", "triton", _takes)
def rows(x: Tensor, power_of_two: bool, fixed: None) -> tuple[Codes, Codes]:
    from leanseek.ops.triton.quantize import quantize_tiles

    codes = quantize_tiles(x, power_of_two)
    return codes, codes


@register("fp8_turn", "triton", _takes)
def turn(x: Tensor | Kept, groups: Groups, power_of_two: bool, dtype: torch.dtype, index: Tensor | None) -> Codes:
    from leanseek.ops.triton.quantize import Codes, turn_tiles

    return turn_tiles(x if isinstance(x, Tensor) else Codes(*x), power_of_two, groups.tiles, index)


@register("fp8_both", "triton", _takes)
def both(x: Tensor, groups: Groups, power_of_two: bool) -> tuple[Codes, Codes]:
    from leanseek.ops.triton.quantize import quantize_both

    return quantize_both(x, power_of_two, groups.tiles)


@register("fp8_blocks", "triton", _takes)
def blocks(weight: Tensor, power_of_two: bool, dtype: torch.dtype, fixed: None) -> Blocks:
    from leanseek.ops.triton.quantize import quantize_blocks_both

    return quantize_blocks_both(weight, power_of_two)


@register("fp8_swiglu", "triton", _takes)
def swiglu(hidden: Tensor, weight: Tensor | None, power_of_two: bool) -> tuple[Codes, Codes]:
    from leanseek.ops.triton.swiglu import swiglu_quantize

    return swiglu_quantize(hidden, weight, power_of_two)


@register("fp8_swiglu_backward", "triton", _takes)
def swiglu_backward(
    grad: Tensor, hidden: Kept, weight: Tensor | None, groups: Groups, power_of_two: bool
) -> tuple[Codes, Codes, Codes, Tensor | None]:
    from leanseek.ops.triton.quantize import Codes
    from leanseek.ops.triton.swiglu import swiglu_backward_quantize

    return swiglu_backward_quantize(grad, Codes(*hidden), weight, groups.tiles, power_of_two)


@register("fp8_e5m6", "triton", _takes)
def round_e5m6(x: Tensor) -> Tensor:
    from leanseek.ops.triton.quantize import round_e5m6

    return round_e5m6(x)


# ---- in either precision ----


def takes_rows(*tensors: Tensor | None) -> bool:
    """Rows of BF16 or float32 that are contiguous; the norm's weight may differ in dtype."""
    return all(
        t is None or (not triton.refusal(t.device) and t.dtype in (torch.bfloat16, torch.float32) and t.stride(-1) == 1)
        for t in tensors
    )


@register("rms_norm", "triton", takes_rows)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from leanseek.ops.triton.elementwise import RMSNorm

    return RMSNorm.apply(x, weight, eps)


@register("swiglu", "triton", takes_rows)
def gated(gate: Tensor, up: Tensor) -> Tensor:
    from leanseek.ops.triton.elementwise import SwiGLU

    return SwiGLU.apply(gate, up)


@register("weighted_swiglu", "triton", takes_rows)
def weighted(hidden: Tensor, weight: Tensor) -> Tensor:
    from leanseek.ops.triton.elementwise import swiglu_forward

    gate, up = hidden.chunk(2, dim=-1)
    return swiglu_forward(gate, up, weight)


@register("weighted_swiglu_backward", "triton", takes_rows)
def weighted_backward(hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from leanseek.ops.triton.elementwise import swiglu_backward

    act, dhidden = torch.empty_like(grad), torch.empty_like(hidden)
    (gate, up), (dgate, dup) = hidden.chunk(2, dim=-1), dhidden.chunk(2, dim=-1)
    dweight = swiglu_backward(grad, gate, up, weight, dgate, dup, act)
    assert dweight is not None
    return act, dhidden, dweight


@register("combine_rows", "triton", takes_rows)
def combine_rows(rows: Tensor, place: Tensor, tokens: int) -> Tensor:
    from leanseek.ops.triton.elementwise import combine

    return combine(rows, place, tokens)


@register("softmax_cross_entropy", "triton", takes_rows)
def softmax_cross_entropy(logits: Tensor, targets: Tensor, share: float, need: bool) -> tuple[Tensor, Tensor]:
    from leanseek.ops.triton.elementwise import softmax_cross_entropy

    return softmax_cross_entropy(logits, targets.contiguous(), share, need), logits


def _attends(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Values are read where they lie, so each head's must begin at 16 bytes; torch keeps cuDNN from single keys too."""
    if triton.refusal(q.device) or not torch.bfloat16 == q.dtype == kv.dtype == k_rope.dtype:
        return False
    from leanseek.ops.triton.attention import refusal

    nope = q.shape[-1] - k_rope.shape[-1]
    value_width = kv.shape[-1] - nope
    if not q.numel() or q.shape[1] == 1 or nope % 8 or value_width % 8:
        return False
    return not refusal(q.shape[-1], value_width, q.device)


@register("mla_attention", "triton", _attends)
def mla_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, interleave: bool
) -> Tensor:
    from leanseek.ops.triton.attention import MLAttention

    k_rope = k_rope if k_rope.stride(-1) == 1 else k_rope.contiguous()
    angles = cos.contiguous(), sin.contiguous()
    return MLAttention.apply(q.contiguous(), kv.contiguous(), k_rope, *angles, scale, interleave)


@register("adamw", "triton", takes_rows)
def adamw(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rule: AdamW) -> None:
    from leanseek.ops.triton.elementwise import adamw

    adamw(weight, grad, exp_avg, exp_avg_sq, step, rule)
