"""Registers the kernels of a training step and says which arguments they accept: the FP8 quantisers in the forms that
leanseek/ops/quantize.py describes, and everything that is not a product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek import ops
from leanseek.gpu import device
from leanseek.gpu.device import implements
from leanseek.ops import cross_entropy, quantize
from leanseek.ops.adamw import AdamW
from leanseek.ops.dispatch import Rows
from leanseek.ops.experts import combine_rows
from leanseek.ops.grouped import Groups
from leanseek.ops.operands import Blocks, Coded, Codes, Kept
from leanseek.ops.quantize import Both, SwiGLUBackward
from leanseek.ops.swiglu import weighted_swiglu, weighted_swiglu_backward


def _takes(x: Tensor | Kept, *_: object) -> bool:
    return not device.refusal((x if isinstance(x, Tensor) else x.codes).device)


def _tilewise(*arguments: object) -> bool:
    """Refuses one scale for a whole tensor (`fixed`): that is for the exact arithmetic, a reference to compare with."""
    x, *others = arguments
    assert isinstance(x, Tensor)
    return _takes(x) and not any(isinstance(other, Tensor) for other in others)


@implements(quantize.quantize_blocks, _takes)
def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    from leanseek.gpu.quantize import quantize_blocks

    codes, scales = quantize_blocks(weight)
    return codes, scales.contiguous()


# ---- the forms of leanseek/ops/quantize.py ----


@implements(quantize.rows, _tilewise)
def rows(x: Tensor, power_of_two: bool, fixed: None = None) -> tuple[Codes, Kept]:
    from leanseek.gpu.quantize import quantize_tiles

    codes = quantize_tiles(x, power_of_two)
    return codes, Kept(*codes)


@implements(quantize.turn, _takes)
def turn(
    x: Tensor | Kept, groups: Groups, power_of_two: bool, dtype: torch.dtype, index: Tensor | None = None
) -> Codes:
    from leanseek.gpu.quantize import turn_tiles

    return turn_tiles(x if isinstance(x, Tensor) else Codes(*x), power_of_two, groups.tiles, index)


@implements(quantize.both, _takes)
def both(x: Tensor, groups: Groups, power_of_two: bool) -> Both:
    from leanseek.gpu.quantize import quantize_both

    return Both(*quantize_both(x, power_of_two, groups.tiles))


@implements(quantize.both_blocks, _takes)
def both_blocks(x: Tensor, groups: Groups, dtype: torch.dtype, halves: int = 1) -> Both:
    """Tiles hold the values of a block exactly: their scales are at most the block's, and powers of two as well."""
    rounded = quantize.both_blocks.reference(x, groups, dtype, halves).rows
    assert isinstance(rounded, Coded)
    return both((rounded.codes * rounded.scale).to(dtype), groups, True)


@implements(quantize.blocks, _tilewise)
def blocks(weight: Tensor, power_of_two: bool, dtype: torch.dtype, fixed: None = None) -> Blocks:
    from leanseek.gpu.quantize import quantize_blocks_both

    return quantize_blocks_both(weight, power_of_two)


@implements(quantize.swiglu, _takes)
def swiglu(hidden: Tensor, weight: Tensor | None, power_of_two: bool) -> tuple[Codes, Kept]:
    from leanseek.gpu.swiglu import swiglu_quantize

    act, kept = swiglu_quantize(hidden, weight, power_of_two)
    return act, Kept(*kept)


@implements(quantize.swiglu_backward, _takes)
def swiglu_backward(
    grad: Tensor, hidden: Kept, weight: Tensor | None, groups: Groups, power_of_two: bool
) -> SwiGLUBackward:
    from leanseek.gpu.swiglu import swiglu_backward_quantize

    by_rows, turned, act, dweight = swiglu_backward_quantize(grad, Codes(*hidden), weight, groups.tiles, power_of_two)
    return SwiGLUBackward(Both(by_rows, turned), act, dweight)


@implements(quantize.round_e5m6, _takes)
def round_e5m6(x: Tensor) -> Tensor:
    from leanseek.gpu.quantize import round_e5m6

    return round_e5m6(x)


def _coded(a: object, *_: object) -> bool:
    return isinstance(a, Codes)  # codes are in the order of their rows: they come without an index


@implements(ops.grouped_product, _coded)
def coded_product(a: Codes, b: Blocks, groups: Groups, dtype: torch.dtype, index: None = None) -> Tensor:
    from leanseek.gpu import paths

    if groups.tiles is None:
        return paths.product(a, Codes(b.codes[0], b.scales[0]), dtype)
    return paths.grouped_product(a, Codes(b.codes, b.scales), groups.tiles, dtype)


@implements(ops.grouped_gradient, _coded)
def coded_gradient(a: Codes, b: Codes, groups: Groups, dtype: torch.dtype, index: None = None) -> Tensor:
    from leanseek.gpu import paths

    if groups.tiles is None:
        return paths.product(a, b, dtype)[None]
    return paths.grouped_weight_gradient(a, b, groups.tiles, dtype)


# ---- in either precision ----


def takes_rows(*arguments: object) -> bool:
    """All tensors are BF16 or float32 with contiguous rows; their dtypes may differ (the norm's weight)."""
    return all(
        not device.refusal(t.device) and t.dtype in (torch.bfloat16, torch.float32) and t.stride(-1) == 1
        for t in arguments
        if isinstance(t, Tensor)
    )


def _first(x: Tensor, *_: object) -> bool:
    return takes_rows(x)


@implements(ops.rms_norm, takes_rows)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from leanseek.gpu.elementwise import RMSNorm

    return RMSNorm.apply(x, weight, eps)


@implements(ops.swiglu, takes_rows)
def gated(gate: Tensor, up: Tensor) -> Tensor:
    from leanseek.gpu.elementwise import SwiGLU

    return SwiGLU.apply(gate, up)


@implements(weighted_swiglu, takes_rows)
def weighted(hidden: Tensor, weight: Tensor) -> Tensor:
    from leanseek.gpu.elementwise import swiglu_forward

    gate, up = hidden.chunk(2, dim=-1)
    return swiglu_forward(gate, up, weight)


@implements(weighted_swiglu_backward, takes_rows)
def weighted_backward(hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from leanseek.gpu.elementwise import swiglu_backward

    act, dhidden = torch.empty_like(grad), torch.empty_like(hidden)
    (gate, up), (dgate, dup) = hidden.chunk(2, dim=-1), dhidden.chunk(2, dim=-1)
    dweight = swiglu_backward(grad, gate, up, weight, dgate, dup, act)
    assert dweight is not None
    return act, dhidden, dweight


def _on_tensor_cores(a: Tensor, b: Tensor, *_: object) -> bool:
    return isinstance(a, Tensor) and a.is_cuda and a.dtype == torch.bfloat16


@implements(ops.grouped_product, _on_tensor_cores)
def grouped_product(a: Tensor, b: Tensor, groups: Groups, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    a = a if index is None else a.index_select(0, index)
    return F.grouped_mm(a, b.to(a.dtype).transpose(1, 2), offs=groups.offsets).to(dtype)


@implements(ops.grouped_gradient, _on_tensor_cores)
def grouped_gradient(a: Tensor, b: Tensor, groups: Groups, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    b = b if index is None else b.index_select(0, index)
    return F.grouped_mm(a.t(), b, offs=groups.offsets).to(dtype)


@implements(combine_rows, _first, Rows.BOTH)
def combined(rows: Tensor, place: Tensor, tokens: int) -> Tensor:
    from leanseek.gpu.elementwise import combine

    return combine(rows, place, tokens)


@implements(cross_entropy.softmax_cross_entropy, _first)
def softmax_cross_entropy(logits: Tensor, targets: Tensor, share: float, need: bool) -> tuple[Tensor, Tensor]:
    from leanseek.gpu.elementwise import softmax_cross_entropy

    return softmax_cross_entropy(logits, targets.contiguous(), share, need), logits


def _attends(q: Tensor, kv: Tensor, k_rope: Tensor, *_: object) -> bool:
    """Values are read in place, so each head's must start at a multiple of 16 bytes. A single key is refused because
    torch does not give it to cuDNN either."""
    if device.refusal(q.device) or not torch.bfloat16 == q.dtype == kv.dtype == k_rope.dtype:
        return False
    from leanseek.gpu.attention import refusal

    nope = q.shape[-1] - k_rope.shape[-1]
    value_width = kv.shape[-1] - nope
    if not q.numel() or q.shape[1] == 1 or nope % 8 or value_width % 8:
        return False
    return not refusal(q.shape[-1], value_width, q.device)


@implements(ops.mla_attention, _attends)
def mla_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, interleave: bool
) -> Tensor:
    from leanseek.gpu.attention import MLAttention

    k_rope = k_rope if k_rope.stride(-1) == 1 else k_rope.contiguous()
    angles = cos.contiguous(), sin.contiguous()
    return MLAttention.apply(q.contiguous(), kv.contiguous(), k_rope, *angles, scale, interleave)


@implements(ops.adamw, lambda *tensors: takes_rows(*tensors[:4]))
def adamw(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rule: AdamW) -> None:
    from leanseek.gpu.elementwise import adamw

    adamw(weight, grad, exp_avg, exp_avg_sq, step, rule)
