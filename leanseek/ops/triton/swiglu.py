"""SwiGLU fused with quantisation, forward and backward: the activation never lies in memory in BF16 (3.3.3).

The pre-activation [M, 2I] holds gate then up; backward computes SwiGLU again from its FP8 codes. `weight` [M] is the
gate's weight of a routed row. I must be a multiple of 128, so that no tile spans gate and up.
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

COLUMNS = 32  # of a turned tile: all four tensors of it in registers


class Backward(NamedTuple):
    hidden: Codes  # gradient of the pre-activation [M, 2I], 1×128 tiles: for the input's gradient
    hidden_t: Codes  # the same turned [2I, 128·T]: for the up projection's weight gradient
    act_t: Codes  # the activation computed again, turned [I, 128·T]: for the down projection's weight gradient
    weight: Tensor | None  # gradient of `weight` [M] float32


def swiglu_quantize(hidden: Tensor, weight: Tensor | None = None, power_of_two: bool = False) -> tuple[Codes, Codes]:
    """weight · silu(gate) · up in 1×128 tiles [M, I], and hidden [M, 2I] in tiles: what is kept for backward."""
    m, i = hidden.shape[0], hidden.shape[1] // 2
    out, kept = new_codes(m, i, hidden.device), new_codes(m, 2 * i, hidden.device)
    if out.codes.numel():
        _forward[(triton.cdiv(m, 16), i // TILE)](
            hidden, weight, *out, *kept, m, i, hidden.stride(0), out.scales.stride(1), kept.scales.stride(1),
            power_of_two, 16, TILE, num_warps=4,
        )  # fmt: skip
    return out, kept


def swiglu_backward_quantize(
    grad: Tensor,
    hidden: Codes,
    weight: Tensor | None = None,
    tiles: Tiles | None = None,
    power_of_two: bool = False,
) -> Backward:
    """grad [M, I] of the activation -> everything that the four products of backward read.

    With `tiles`, turned rows of no expert are left as they were in memory.
    """
    m, i = grad.shape
    out, out_t = new_codes(m, 2 * i, grad.device), new_transposed(m, 2 * i, tiles, grad.device)
    act_t = new_transposed(m, i, tiles, grad.device)
    partial = None if weight is None else torch.zeros(i // TILE, m, device=grad.device)
    start, stop = (None, None) if tiles is None else (tiles.start, tiles.stop)
    if grad.numel():
        strides = grad.stride(0), hidden.codes.stride(0), hidden.scales.stride(1)
        _backward_rows[(triton.cdiv(m, 16), i // TILE)](
            grad, *hidden, weight, *out, partial, m, i, *strides, out.scales.stride(1), power_of_two, 16, TILE,
            num_warps=4,
        )  # fmt: skip
        count = triton.cdiv(m, TILE) if tiles is None else tiles.start.numel()
        _backward_turned[(3, count, i // COLUMNS)](
            grad, *hidden, weight, *out_t, *act_t, start, stop, m, i, *strides, out_t.codes.stride(0),
            out_t.scales.stride(1), act_t.scales.stride(1), tiles is not None, power_of_two, COLUMNS, TILE,
            num_warps=4,
        )  # fmt: skip
    return Backward(out, out_t, act_t, None if partial is None else partial.sum(0))


@triton.jit
def _forward(
    hidden, weights, codes, scales, kept, kept_scales, M, I, stride_h, stride_s, stride_ks,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    rows, kb = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    columns, up_kb = kb * TILE + tl.arange(0, TILE), kb + I // TILE
    places = rows[:, None].to(tl.int64) * stride_h + columns[None, :]
    gate = tl.load(hidden + places, mask=rows[:, None] < M, other=0.0).to(tl.float32)
    up = tl.load(hidden + places + I, mask=rows[:, None] < M, other=0.0).to(tl.float32)
    act = gate * _sigmoid(gate) * up
    if weights is not None:
        act *= tl.load(weights + rows, mask=rows < M, other=0.0)[:, None]
    store_rows(act, codes, scales, rows, M, columns, I, kb, I, stride_s, POWER_OF_TWO)
    store_rows(gate, kept, kept_scales, rows, M, columns, 2 * I, kb, 2 * I, stride_ks, POWER_OF_TWO)
    store_rows(up, kept, kept_scales, rows, M, columns + I, 2 * I, up_kb, 2 * I, stride_ks, POWER_OF_TWO)


@triton.jit
def _backward_rows(
    grad, hidden, hidden_scales, weights, codes, scales, partial, M, I, stride_g, stride_h, stride_hs, stride_s,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The pre-activation's gradient in 1×128 tiles, and a tile's part in the weights' gradient."""
    rows, kb = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    columns = kb * TILE + tl.arange(0, TILE)
    g, gate, up, sig, weight = _load_tile(
        grad, hidden, hidden_scales, weights, rows, M, columns, I, kb, stride_g, stride_h, stride_hs, TILE
    )
    if weights is not None:
        tl.store(partial + kb * M + rows, tl.sum(g * (gate * sig * up), 1), mask=rows < M)
    g *= weight[:, None]
    into_gate, into_up = g * up * (sig + gate * sig * (1 - sig)), g * (gate * sig)
    store_rows(into_gate, codes, scales, rows, M, columns, 2 * I, kb, 2 * I, stride_s, POWER_OF_TWO)
    store_rows(into_up, codes, scales, rows, M, columns + I, 2 * I, kb + I // TILE, 2 * I, stride_s, POWER_OF_TWO)


@triton.jit
def _backward_turned(
    grad, hidden, hidden_scales, weights, codes_t, scales_t, act_t, act_scales_t, starts, stops,
    M, I, stride_g, stride_h, stride_hs, stride_t, stride_ts, stride_as,
    GROUPED: tl.constexpr, POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of gate and up and the activation, turned: a program each, side by side, so that the second and
    third read from the cache; together they would not fit into the registers."""
    part, t = tl.program_id(0), tl.program_id(1)
    start, stop = row_range(t, starts, stops, M, GROUPED, TILE)
    if start < stop:
        rows, columns = start + tl.arange(0, TILE), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        kb = tl.program_id(2) * COLUMNS // TILE
        g, gate, up, sig, weight = _load_tile(
            grad, hidden, hidden_scales, weights, rows, stop, columns, I, kb, stride_g, stride_h, stride_hs, TILE
        )
        if part == 2:
            act = gate * sig * up * weight[:, None]
            store_columns(act, act_t, act_scales_t, t, columns, I, stride_t, stride_as, POWER_OF_TWO, TILE)
        else:
            slope = tl.where(part == 0, up * (sig + gate * sig * (1 - sig)), gate * sig)
            d, into = g * weight[:, None] * slope, columns + part * I
            store_columns(d, codes_t, scales_t, t, into, 2 * I, stride_t, stride_ts, POWER_OF_TWO, TILE)


@triton.jit
def _load_tile(
    grad, hidden, scales, weights, rows, stop, columns, I, kb, stride_g, stride_h, stride_s, TILE: tl.constexpr
):
    """The activation's gradient, gate, up, gate's sigmoid as float32 and the rows' weights: zero past `stop`."""
    inside, wide = rows < stop, rows.to(tl.int64)
    g = tl.load(grad + wide[:, None] * stride_g + columns[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    places = wide[:, None] * stride_h + columns[None, :]
    gate = tl.load(hidden + places, mask=inside[:, None], other=0.0).to(tl.float32)
    gate *= tl.load(scales + kb * stride_s + rows, mask=inside, other=0.0)[:, None]
    up = tl.load(hidden + places + I, mask=inside[:, None], other=0.0).to(tl.float32)
    up *= tl.load(scales + (kb + I // TILE) * stride_s + rows, mask=inside, other=0.0)[:, None]
    weight = tl.where(inside, 1.0, 0.0)
    if weights is not None:
        weight = tl.load(weights + rows, mask=inside, other=0.0)
    return g, gate, up, _sigmoid(gate), weight


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))
