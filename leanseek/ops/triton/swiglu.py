"""SwiGLU fused with quantisation, forward and backward: the activation never lies in memory in BF16 (3.3.3).

The pre-activation [M, 2I] holds gate then up; it is BF16 or FP32, or the FP8 codes that were kept for backward, from
which SwiGLU is computed again. `weight` [M] is the gate's weight of a routed row. I must be a multiple of 128, so that
no tile spans gate and up.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel is given is typed by Triton)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.triton.numbers import TILE
from leanseek.ops.triton.quantize import Codes, new_codes, new_transposed, row_range, store_columns, store_rows
from leanseek.ops.triton.tiles import Tiles


class Backward(NamedTuple):
    hidden: Codes  # gradient of the pre-activation [M, 2I], 1×128 tiles: for the input's gradient
    hidden_t: Codes  # the same turned [2I, 128·T]: for the up projection's weight gradient
    act_t: Codes  # the activation computed again, turned [I, 128·T]: for the down projection's weight gradient
    weight: Tensor | None  # gradient of `weight` [M] float32


def swiglu_quantize(hidden: Tensor | Codes, weight: Tensor | None = None, power_of_two: bool = False) -> Codes:
    """weight · silu(gate) · up in 1×128 tiles [M, I]."""
    values, scales = hidden if isinstance(hidden, Codes) else (hidden, None)
    m, i = values.shape[0], values.shape[1] // 2
    out = new_codes(m, i, values.device)
    if out.codes.numel():
        _forward[(triton.cdiv(m, 32), i // TILE)](
            values, scales, weight, *out, m, i, values.stride(0), 0 if scales is None else scales.stride(1),
            out.scales.stride(1), scales is not None, weight is not None, power_of_two, 32, TILE, num_warps=4,
        )  # fmt: skip
    return out


def swiglu_backward_quantize(
    grad: Tensor,
    hidden: Tensor | Codes,
    weight: Tensor | None = None,
    tiles: Tiles | None = None,
    power_of_two: bool = False,
) -> Backward:
    """grad [M, I] of the activation -> everything that the four products of backward read, in one pass.

    With `tiles`, rows of no expert are left as they were in memory.
    """
    values, scales = hidden if isinstance(hidden, Codes) else (hidden, None)
    m, i = grad.shape
    out, out_t = new_codes(m, 2 * i, grad.device), new_transposed(m, 2 * i, tiles, grad.device)
    act_t = new_transposed(m, i, tiles, grad.device)
    partial = None if weight is None else torch.zeros(i // TILE, m, device=grad.device)
    start, stop = (None, None) if tiles is None else (tiles.start, tiles.stop)
    if grad.numel():
        count = triton.cdiv(m, TILE) if tiles is None else tiles.start.numel()
        _backward[(3, count, i // TILE)](
            grad, values, scales, weight, *out, *out_t, *act_t, partial, start, stop, m, i, grad.stride(0),
            values.stride(0), 0 if scales is None else scales.stride(1), out.scales.stride(1), out_t.codes.stride(0),
            out_t.scales.stride(1), act_t.scales.stride(1), scales is not None, weight is not None, tiles is not None,
            power_of_two, TILE, num_warps=16,
        )  # fmt: skip
    return Backward(out, out_t, act_t, None if partial is None else partial.sum(0))


@triton.jit
def _forward(
    hidden, hidden_scales, weights, codes, scales, M, I, stride_h, stride_hs, stride_s,
    CODED: tl.constexpr, WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    rows, kb = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    gate = _load_half(hidden, hidden_scales, rows, M, kb, stride_h, stride_hs, CODED, TILE)
    up = _load_half(hidden, hidden_scales, rows, M, kb + I // TILE, stride_h, stride_hs, CODED, TILE)
    act = gate * _sigmoid(gate) * up
    if WEIGHTED:
        act *= tl.load(weights + rows, mask=rows < M, other=0.0)[:, None]
    store_rows(act, codes, scales, rows, M, kb * TILE + tl.arange(0, TILE), I, kb, I, stride_s, POWER_OF_TWO)


@triton.jit
def _backward(
    grad, hidden, hidden_scales, weights, codes, scales, codes_t, scales_t, act_t, act_scales_t, partial, starts, stops,
    M, I, stride_g, stride_h, stride_hs, stride_s, stride_t, stride_ts, stride_as,
    CODED: tl.constexpr, WEIGHTED: tl.constexpr, GROUPED: tl.constexpr, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a tile and a part: the gradient of gate, of up, or the activation. Side by side, so that the second
    and third read from the cache; together they would not fit into the registers."""
    part, t, kb = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = row_range(t, starts, stops, M, GROUPED, TILE)
    if start < stop:
        rows, columns = start + tl.arange(0, TILE), kb * TILE + tl.arange(0, TILE)
        places = rows[:, None].to(tl.int64) * stride_g + columns[None, :]
        g = tl.load(grad + places, mask=rows[:, None] < stop, other=0.0).to(tl.float32)
        gate = _load_half(hidden, hidden_scales, rows, stop, kb, stride_h, stride_hs, CODED, TILE)
        up = _load_half(hidden, hidden_scales, rows, stop, kb + I // TILE, stride_h, stride_hs, CODED, TILE)
        weight = tl.full((TILE,), 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + rows, mask=rows < stop, other=0.0)
        sig = _sigmoid(gate)
        if part == 2:
            act = gate * sig * up
            if WEIGHTED:
                tl.store(partial + kb * M + rows, tl.sum(g * act, 1), mask=rows < stop)
            act *= weight[:, None]
            store_columns(act, act_t, act_scales_t, t, columns, I, stride_t, stride_as, POWER_OF_TWO, TILE)
        else:
            slope = tl.where(part == 0, up * (sig + gate * sig * (1 - sig)), gate * sig)
            d = g * weight[:, None] * slope
            into, kb_into = columns + part * I, kb + part * (I // TILE)
            store_rows(d, codes, scales, rows, stop, into, 2 * I, kb_into, 2 * I, stride_s, POWER_OF_TWO)
            store_columns(d, codes_t, scales_t, t, into, 2 * I, stride_t, stride_ts, POWER_OF_TWO, TILE)


@triton.jit
def _load_half(hidden, scales, rows, stop, kb, stride, stride_s, CODED: tl.constexpr, TILE: tl.constexpr):
    """128 columns of the pre-activation as float32, zero past `stop`."""
    places = rows[:, None].to(tl.int64) * stride + kb * TILE + tl.arange(0, TILE)[None, :]
    v = tl.load(hidden + places, mask=rows[:, None] < stop, other=0.0).to(tl.float32)
    if CODED:
        v *= tl.load(scales + kb * stride_s + rows, mask=rows < stop, other=0.0)[:, None]
    return v


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))
