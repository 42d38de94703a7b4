"""SwiGLU fused with quantisation, forward and backward: the activation is never stored in BF16 (3.3.3).

The pre-activation [M, 2I] holds gate, then up; backward recomputes SwiGLU from its FP8 codes. `weight` [M] is the
gate's weight for each routed row. I must be a multiple of 128, so that no tile spans gate and up.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton types a kernel's arguments)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.gpu.numbers import INTERPRETED, known
from leanseek.gpu.quantize import (
    Codes,
    new_codes,
    new_transposed,
    row_range,
    store_four,
    store_rows,
    turn_four,
)
from leanseek.ops.formats import TILE
from leanseek.ops.grouped import Tiles

BACKWARD = {"num_warps": 8}  # two programs fit on a multiprocessor


class Backward(NamedTuple):
    hidden: Codes  # gradient of the pre-activation [M, 2I], 1×128 tiles: for the input's gradient
    hidden_t: Codes  # its transpose [2I, 128·T]: for the up projection's weight gradient
    act_t: Codes  # the recomputed activation's transpose [I, 128·T]: for the down projection's weight gradient
    weight: Tensor | None  # gradient of `weight` [M] float32


def swiglu_quantize(hidden: Tensor, weight: Tensor | None = None, power_of_two: bool = False) -> tuple[Codes, Codes]:
    """weight · silu(gate) · up in 1×128 tiles [M, I], and hidden [M, 2I] in tiles, to save for backward."""
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
    """From the activation's gradient, grad [M, I], computes everything that the four products of backward read.

    With `tiles`, rows that belong to no expert stay uninitialised.
    """
    m, i = grad.shape
    out, out_t = new_codes(m, 2 * i, grad.device), new_transposed(m, 2 * i, tiles, grad.device)
    act_t = new_transposed(m, i, tiles, grad.device)
    partial = None if weight is None else torch.zeros(i // TILE, m, device=grad.device)
    start, stop = (None, None) if tiles is None else (tiles.start, tiles.stop)
    if grad.numel():
        count = triton.cdiv(m, TILE) if tiles is None else tiles.start.numel()
        into, act = out_t.codes.view(torch.int32), act_t.codes.view(torch.int32)
        _backward[(3, count, i // TILE)](
            grad, *hidden, weight, *out, into, out_t.scales, act, act_t.scales, partial, start, stop, m, i,
            grad.stride(0), hidden.codes.stride(0), hidden.scales.stride(1), out.scales.stride(1), into.stride(0),
            out_t.scales.stride(1), act_t.scales.stride(1), power_of_two, TILE,
            **BACKWARD,
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
    gate = known(tl.load(hidden + places, mask=rows[:, None] < M, other=0.0))
    up = known(tl.load(hidden + places + I, mask=rows[:, None] < M, other=0.0))
    act = gate * _sigmoid(gate) * up
    if weights is not None:
        act *= tl.load(weights + rows, mask=rows < M, other=0.0)[:, None]
    store_rows(known(act), codes, scales, rows, M, columns, I, kb, I, stride_s, POWER_OF_TWO)
    store_rows(gate, kept, kept_scales, rows, M, columns, 2 * I, kb, 2 * I, stride_ks, POWER_OF_TWO)
    store_rows(up, kept, kept_scales, rows, M, columns + I, 2 * I, up_kb, 2 * I, stride_ks, POWER_OF_TWO)


@triton.jit
def _backward(
    grad, hidden, hidden_scales, weights, codes, scales, codes_t, scales_t, act_t, act_scales_t, partial, starts, stops,
    M, I, stride_g, stride_h, stride_hs, stride_s, stride_t, stride_ts, stride_as,
    POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """128 rows and columns of gate's gradient (part 0) and up's (part 1), row-wise and transposed, and of the
    activation (part 2), transposed. Registers hold only one part, so each is a program of its own; the three run side
    by side, so the second and third read from the cache."""
    part, t, kb = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = row_range(t, starts, stops, M, TILE)
    if start < stop:
        rows, columns = start + 4 * tl.arange(0, TILE // 4), kb * TILE + tl.arange(0, TILE)
        given, sizes = (grad, hidden, hidden_scales, weights, partial), (M, I, kb, stride_g, stride_h, stride_hs)
        if part == 2:
            a, b, c, d = _four(2, given, sizes, rows, stop, columns, TILE)
            turn_four(a, b, c, d, act_t, act_scales_t, t, columns, I, stride_t, stride_as, POWER_OF_TWO, TILE)
        elif part == 1:
            a, b, c, d = _four(1, given, sizes, rows, stop, columns, TILE)
            into = columns + I
            store_four(
                a, b, c, d, codes, scales, rows, stop, into, 2 * I, kb + I // TILE, 2 * I, stride_s, POWER_OF_TWO
            )
            turn_four(a, b, c, d, codes_t, scales_t, t, into, 2 * I, stride_t, stride_ts, POWER_OF_TWO, TILE)
        else:
            a, b, c, d = _four(0, given, sizes, rows, stop, columns, TILE)
            store_four(a, b, c, d, codes, scales, rows, stop, columns, I, kb, 2 * I, stride_s, POWER_OF_TWO)
            turn_four(a, b, c, d, codes_t, scales_t, t, columns, I, stride_t, stride_ts, POWER_OF_TWO, TILE)


@triton.jit
def _four(part: tl.constexpr, given, sizes, rows, stop, columns, TILE: tl.constexpr):
    a = _values(part, given, sizes, rows, stop, columns, TILE)
    b = _values(part, given, sizes, rows + 1, stop, columns, TILE)
    c = _values(part, given, sizes, rows + 2, stop, columns, TILE)
    d = _values(part, given, sizes, rows + 3, stop, columns, TILE)
    return a, b, c, d


@triton.jit
def _values(part: tl.constexpr, given, sizes, rows, stop, columns, TILE: tl.constexpr):
    """[32, 128] of the gradient of gate (part 0) or up (1), or of the activation (2), zero past `stop`.

    Part 2 also writes the partial sums of the routing weights' gradient.
    """
    grad, hidden, scales, weights, partial = given
    M, I, kb, stride_g, stride_h, stride_s = sizes
    inside, wide = rows < stop, rows.to(tl.int64)
    g = tl.load(grad + wide[:, None] * stride_g + columns[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    places = wide[:, None] * stride_h + columns[None, :]
    gate = tl.load(hidden + places, mask=inside[:, None], other=0.0).to(tl.float32)
    gate *= tl.load(scales + kb * stride_s + rows, mask=inside, other=0.0)[:, None]
    sig = _sigmoid(gate)
    silu = gate * sig
    if part == 1:
        v = g * silu
    else:
        up = tl.load(hidden + places + I, mask=inside[:, None], other=0.0).to(tl.float32)
        up *= tl.load(scales + (kb + I // TILE) * stride_s + rows, mask=inside, other=0.0)[:, None]
        v = silu * up if part == 2 else g * up * (sig + silu * (1 - sig))
    if weights is not None:
        if part == 2:
            tl.store(partial + kb * M + rows, tl.sum(g * v, 1), mask=inside)
        v *= tl.load(weights + rows, mask=inside, other=0.0)[:, None]
    return known(v)


@triton.jit
def _sigmoid(v):
    """1 / (1 + e^-v), off by a few last bits: a full exp and division would take half of a SwiGLU kernel's time."""
    if INTERPRETED:
        s = 1.0 / (1.0 + tl.exp(-v))
    else:
        s = tl.inline_asm_elementwise(
            "{.reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
            " add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t;}",
            "=f,f",
            [v],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return s
