"""Quantise: 1×128 tiles, with the 128×1 tiles of the transposed matrix in the same pass, and 128×128 weight blocks.

Scales of rows are stored with the rows contiguous (stride [1, rows]): the layout of cuBLASLt and DeepGEMM, and whole
lines for the products here.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel is given is typed by Triton)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.triton.numbers import TILE, encode, magnitude, tile_scale
from leanseek.ops.triton.tiles import Tiles

FP8 = torch.float8_e4m3fn


class Codes(NamedTuple):
    """x = codes · scales. codes [rows, columns] E4M3, scales [rows, ceil(columns / 128)] float32 by columns."""

    codes: Tensor
    scales: Tensor


def new_codes(rows: int, columns: int, device: torch.device) -> Codes:
    """Room for codes and their scales; a column of scales starts at a multiple of 16 bytes."""
    scales = torch.empty(-(-columns // TILE), -(-rows // 4) * 4, dtype=torch.float32, device=device)
    return Codes(torch.empty(rows, columns, dtype=FP8, device=device), scales[:, :rows].t())


def new_transposed(rows: int, columns: int, tiles: Tiles | None, device: torch.device) -> Codes:
    """Room for the transposed codes [columns, 128 · tiles], a tile of fewer than 128 rows padded with zeros."""
    count = -(-rows // TILE) if tiles is None else tiles.start.numel()
    return new_codes(columns, count * TILE, device)


def quantize_tiles(x: Tensor, power_of_two: bool = False) -> Codes:
    """x [M, K], float32 or BF16, in 1×128 tiles."""
    m, k = x.shape
    out = new_codes(m, k, x.device)
    _launch(x, out, None, None, power_of_two, rows=32)
    return out


def quantize_both(x: Tensor, power_of_two: bool = False, tiles: Tiles | None = None) -> tuple[Codes, Codes]:
    """x [M, K] in 1×128 tiles, and xᵀ [K, 128 · T] with a scale for each 128 of x's rows: read once, written twice.

    With `tiles` a run of 128 rows never holds two experts; T is their number, else ceil(M / 128).
    """
    m, k = x.shape
    out, transposed = new_codes(m, k, x.device), new_transposed(m, k, tiles, x.device)
    _launch(x, out, transposed, tiles, power_of_two, rows=TILE)
    return out, transposed


def quantize_blocks(
    weight: Tensor, power_of_two: bool = False, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight [..., N, K] in 128×128 blocks: codes, scales [..., ceil(N/128), ceil(K/128)], and, with `transpose`, the
    same codes as [..., K, N] for the input's gradient (their scales are the transposed scales)."""
    n, k = weight.shape[-2:]
    rows = weight.reshape(-1, n, k).contiguous()
    experts, blocks = rows.shape[0], (-(-n // TILE), -(-k // TILE))
    codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(*weight.shape[:-2], *blocks, dtype=torch.float32, device=weight.device)
    turned = torch.empty(*weight.shape[:-2], k, n, dtype=FP8, device=weight.device) if transpose else None
    if rows.numel():
        _blocks[(blocks[1], blocks[0], experts)](
            rows, codes, turned, scales, n, k, transpose, power_of_two, TILE, num_warps=16
        )
    return codes, scales, turned


def _launch(x: Tensor, out: Codes, turned: Codes | None, tiles: Tiles | None, power_of_two: bool, rows: int) -> None:
    if not x.numel():
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    count = -(-x.shape[0] // rows) if tiles is None else tiles.start.numel()
    start, stop = (None, None) if tiles is None else (tiles.start, tiles.stop)
    codes_t, scales_t = (None, None) if turned is None else turned
    _tiles[(count, -(-x.shape[1] // TILE))](
        x, out.codes, out.scales, codes_t, scales_t, start, stop, *x.shape, x.stride(0), out.scales.stride(1),
        0 if codes_t is None else codes_t.stride(0), 0 if scales_t is None else scales_t.stride(1),
        tiles is not None, turned is not None, power_of_two, rows, TILE, num_warps=16 if rows == TILE else 4,
    )  # fmt: skip


@triton.jit
def _tiles(
    x, codes, scales, codes_t, scales_t, starts, stops, M, K, stride_x, stride_s, stride_t, stride_ts,
    GROUPED: tl.constexpr, TURN: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    t, kb = tl.program_id(0), tl.program_id(1)
    start, stop = row_range(t, starts, stops, M, GROUPED, ROWS)
    if start < stop:
        rows, columns = start + tl.arange(0, ROWS), kb * TILE + tl.arange(0, TILE)
        inside = (rows[:, None] < stop) & (columns[None, :] < K)
        v = tl.load(x + rows[:, None].to(tl.int64) * stride_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        store_rows(v, codes, scales, rows, stop, columns, K, kb, K, stride_s, POWER_OF_TWO)
        if TURN:
            store_columns(v, codes_t, scales_t, t, columns, K, stride_t, stride_ts, POWER_OF_TWO, TILE)


@triton.jit
def row_range(t, starts, stops, M, GROUPED: tl.constexpr, ROWS: tl.constexpr):
    """Rows of tile t: from the experts' table, or simply every ROWS rows."""
    if GROUPED:
        start, stop = tl.load(starts + t), tl.load(stops + t)
    else:
        start = t * ROWS
        stop = tl.minimum(start + ROWS, M)
    return start, stop


@triton.jit
def store_rows(v, codes, scales, rows, stop, columns, limit, kb, stride, stride_s, POWER_OF_TWO: tl.constexpr):
    """v [rows, 128] float32, zero outside, as codes with one scale a row, which is column `kb` of the scales."""
    scale = tile_scale(tl.max(magnitude(v), 1), POWER_OF_TWO)
    inside = (rows[:, None] < stop) & (columns[None, :] < limit)
    tl.store(codes + rows[:, None].to(tl.int64) * stride + columns[None, :], encode(v, scale[:, None]), mask=inside)
    tl.store(scales + kb * stride_s + rows, scale, mask=rows < stop)


@triton.jit
def store_columns(
    v, codes, scales, t, columns, limit, stride, stride_s, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr
):
    """v [128, 128] as transposed codes: columns 128 t to 128 (t + 1) of [limit, 128 T], one scale a column of v."""
    scale = tile_scale(tl.max(magnitude(v), 0), POWER_OF_TWO)
    places = t * TILE + tl.arange(0, TILE)
    q = tl.trans(encode(v, scale[None, :]))
    tl.store(codes + columns[:, None].to(tl.int64) * stride + places[None, :], q, mask=columns[:, None] < limit)
    tl.store(scales + t * stride_s + columns, scale, mask=columns < limit)


@triton.jit
def _blocks(weight, codes, turned, scales, N, K, TURN: tl.constexpr, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr):
    kb, nb, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = nb * TILE + tl.arange(0, TILE), kb * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    places = expert * N * K + rows[:, None].to(tl.int64) * K + columns[None, :]
    v = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    scale = tile_scale(tl.max(tl.max(magnitude(v), 1, keep_dims=True), 0, keep_dims=True), POWER_OF_TWO)  # [1, 1]
    q = encode(v, scale)
    tl.store(codes + places, q, mask=inside)
    one = tl.arange(0, 1)
    block = (expert * tl.num_programs(1) + nb) * tl.num_programs(0) + kb
    tl.store(scales + block + one[:, None] + one[None, :], scale)
    if TURN:
        places = expert * N * K + columns[:, None].to(tl.int64) * N + rows[None, :]
        tl.store(turned + places, tl.trans(q), mask=(columns[:, None] < K) & (rows[None, :] < N))
