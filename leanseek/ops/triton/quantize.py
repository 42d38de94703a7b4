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

from leanseek.ops.triton.numbers import E5M6_MAX, TILE, divide, encode, magnitude, narrow, on_grid, tile_scale
from leanseek.ops.triton.tiles import Tiles

FP8 = torch.float8_e4m3fn
BLOCK_WARPS = 8


class Codes(NamedTuple):
    """x = codes · scales. codes [rows, columns] E4M3, scales [rows, ceil(columns / 128)] float32 by columns."""

    codes: Tensor
    scales: Tensor

    def take(self, rows: Tensor) -> Codes:
        """Rows in another order, or several times."""
        found = new_codes(rows.numel(), self.codes.shape[1], self.codes.device)
        wide = torch.int64 if self.codes.shape[1] % 8 == 0 else torch.uint8  # copied 8 codes at a time
        torch.index_select(self.codes.view(wide), 0, rows, out=found.codes.view(wide))
        torch.index_select(self.scales.t(), 1, rows, out=found.scales.t())
        return found


class Blocks(NamedTuple):
    """Weights in 128×128 blocks: codes [.., N, K], scales [.., ceil(N / 128), ceil(K / 128)] float32, and the same
    codes as [.., K, N], because FP8 products read both operands along the side that is summed."""

    codes: Tensor
    scales: Tensor
    turned: Tensor

    def take(self, expert: int) -> Blocks:
        return Blocks(self.codes[expert], self.scales[expert], self.turned[expert])

    def transpose(self, a: int, b: int) -> Blocks:
        return Blocks(self.turned, self.scales.transpose(a, b), self.codes)

    def t(self) -> Blocks:
        return self.transpose(0, 1)


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
    _launch(x, out, None, None, power_of_two, m)
    return out


def quantize_both(x: Tensor, power_of_two: bool = False, tiles: Tiles | None = None) -> tuple[Codes, Codes]:
    """x [M, K] in 1×128 tiles, and xᵀ [K, 128 · T] with a scale for each 128 of x's rows: read once, written twice.

    With `tiles` a run of 128 rows never holds two experts; T is their number, else ceil(M / 128).
    """
    m, k = x.shape
    out, transposed = new_codes(m, k, x.device), new_transposed(m, k, tiles, x.device)
    _launch(x, out, transposed, tiles, power_of_two, m)
    return out, transposed


def turn_tiles(
    x: Tensor | Codes, power_of_two: bool = False, tiles: Tiles | None = None, index: Tensor | None = None
) -> Codes:
    """The second part of `quantize_both` alone, of rows `index` of x (all when None), which may be codes."""
    values = x if isinstance(x, Tensor) else x.codes
    m = values.shape[0] if index is None else index.numel()
    transposed = new_transposed(m, values.shape[1], tiles, values.device)
    _launch(x, None, transposed, tiles, power_of_two, m, index)
    return transposed


def round_e5m6(x: Tensor) -> Tensor:
    """x [..., C] as E5M6 with a power-of-two scale for each 128 holds it, in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(flat.shape[0], 32), triton.cdiv(flat.shape[1], TILE))
        _e5m6[grid](flat, out, *flat.shape, flat.stride(0), 32, TILE, num_warps=8)
    return out.view(x.shape)


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
            rows, codes, turned, scales, n, k, transpose, power_of_two, TILE, num_warps=BLOCK_WARPS
        )
    return codes, scales, turned


def _launch(
    x: Tensor | Codes,
    out: Codes | None,
    turned: Codes | None,
    tiles: Tiles | None,
    power_of_two: bool,
    m: int,
    index: Tensor | None = None,
) -> None:
    values, scales = x if isinstance(x, Codes) else (x, None)
    k = values.shape[1]
    if not m * k:
        return
    values = values if values.stride(1) == 1 else values.contiguous()
    rows = 32 if turned is None else TILE
    count = -(-m // rows) if tiles is None else tiles.start.numel()
    start, stop = (None, None) if tiles is None else (tiles.start, tiles.stop)
    codes, new_scales = (None, None) if out is None else out
    codes_t, scales_t = (None, None) if turned is None else turned
    columns, warps = (64, 2) if out is None and scales is None else (TILE, 4)  # measured on an H100
    _tiles[(count, -(-k // columns))](
        values, scales, index, codes, new_scales, codes_t, scales_t, start, stop, m, k, values.stride(0),
        0 if scales is None else scales.stride(1), 0 if new_scales is None else new_scales.stride(1),
        0 if codes_t is None else codes_t.stride(0), 0 if scales_t is None else scales_t.stride(1),
        tiles is not None, power_of_two, rows, columns, TILE, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _tiles(
    x, x_scales, index, codes, scales, codes_t, scales_t, starts, stops, M, K,
    stride_x, stride_xs, stride_s, stride_t, stride_ts,
    GROUPED: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What is None is not there: x's scales where x is no codes, the index, either result. Codes by rows need tiles
    128 columns wide, turned ones 128 rows."""
    t, kb = tl.program_id(0), tl.program_id(1)
    start, stop = row_range(t, starts, stops, M, GROUPED, ROWS)
    if start < stop:
        rows, columns = start + tl.arange(0, ROWS), kb * COLUMNS + tl.arange(0, COLUMNS)
        source = rows
        if index is not None:
            source = tl.load(index + rows, mask=rows < stop, other=0)
        inside = (rows[:, None] < stop) & (columns[None, :] < K)
        places = source[:, None].to(tl.int64) * stride_x + columns[None, :]
        v = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        if x_scales is not None:
            v *= tl.load(x_scales + kb * COLUMNS // TILE * stride_xs + source, mask=rows < stop, other=0.0)[:, None]
        if codes is not None:
            store_rows(v, codes, scales, rows, stop, columns, K, kb, K, stride_s, POWER_OF_TWO)
        if codes_t is not None:
            store_columns(v, codes_t, scales_t, t, columns, K, stride_t, stride_ts, POWER_OF_TWO, TILE)


@triton.jit
def _e5m6(x, out, M, K, stride, ROWS: tl.constexpr, TILE: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    v = tl.load(x + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tile_scale(tl.max(magnitude(v), 1), True, E5M6_MAX)[:, None]
    rounded = on_grid(divide(v, scale, True), E5M6_MAX, 6, -14) * scale
    rounded = tl.where(tl.abs(v) < float("inf"), rounded, float("nan"))
    tl.store(
        out + rows[:, None].to(tl.int64) * K + columns[None, :], narrow(rounded, out.dtype.element_ty), mask=inside
    )


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
    tl.store(
        codes + rows[:, None].to(tl.int64) * stride + columns[None, :],
        encode(v, scale[:, None], POWER_OF_TWO),
        mask=inside,
    )
    tl.store(scales + kb * stride_s + rows, scale, mask=rows < stop)


@triton.jit
def store_columns(
    v, codes, scales, t, columns, limit, stride, stride_s, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr
):
    """v [128, 128] as transposed codes: columns 128 t to 128 (t + 1) of [limit, 128 T], one scale a column of v."""
    scale = tile_scale(tl.max(magnitude(v), 0), POWER_OF_TWO)
    places = t * TILE + tl.arange(0, TILE)
    q = tl.trans(encode(v, scale[None, :], POWER_OF_TWO))
    tl.store(codes + columns[:, None].to(tl.int64) * stride + places[None, :], q, mask=columns[:, None] < limit)
    tl.store(scales + t * stride_s + columns, scale, mask=columns < limit)


@triton.jit
def _blocks(weight, codes, turned, scales, N, K, TURN: tl.constexpr, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr):
    kb, nb, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = nb * TILE + tl.arange(0, TILE), kb * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    places = expert * N * K + rows[:, None].to(tl.int64) * K + columns[None, :]
    v = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(magnitude(v), 1), 0)
    scale = tile_scale(tl.full((TILE,), 0.0, tl.float32) + amax, POWER_OF_TWO)  # of each row
    tl.store(codes + places, encode(v, scale[:, None], POWER_OF_TWO), mask=inside)
    block = (expert * tl.num_programs(1) + nb) * tl.num_programs(0) + kb
    tl.store(scales + block, tl.max(scale, 0))
    if TURN:
        # Read again: ptxas 12.8 packs the codes above for their store and then takes lone bytes from a dead register.
        tl.debug_barrier()
        q = tl.trans(tl.load(codes + places, mask=inside, other=0.0))
        places = expert * N * K + columns[:, None].to(tl.int64) * N + rows[None, :]
        tl.store(turned + places, q, mask=(columns[:, None] < K) & (rows[None, :] < N))
