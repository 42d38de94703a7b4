"""Quantise to E4M3: 1×128 tiles, the 128×1 tiles of the transposed matrix in the same pass, and 128×128 weight blocks.

Row scales are stored with the rows contiguous (stride [1, rows rounded up to a multiple of 4]). cuBLASLt (for multiples
of 4 rows) and DeepGEMM expect this layout, and our own products read it in whole cache lines.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton types a kernel's arguments)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.gpu.numbers import E5M6_MAX, divide, encode, encode_four, known, largest, narrow, on_grid, tile_scale
from leanseek.ops.formats import TILE
from leanseek.ops.grouped import Tiles
from leanseek.ops.operands import FP8, Blocks, Codes, new_codes

BLOCK_WARPS = 8
TURN = {"num_warps": 4, "maxnreg": 168}  # three programs fit on a multiprocessor


def new_transposed(rows: int, columns: int, tiles: Tiles | None, device: torch.device) -> Codes:
    """Allocates transposed codes [columns, 128 · tiles]; a tile of fewer than 128 rows is padded with zeros."""
    count = -(-rows // TILE) if tiles is None else tiles.start.numel()
    return new_codes(columns, count * TILE, device)


def new_blocks(shape: torch.Size, device: torch.device) -> Codes:
    """Allocates codes [.., N, K] and their block scales, each row of which is aligned to 16 bytes (for cuBLASLt)."""
    *lead, n, k = shape
    columns = -(-k // TILE)
    scales = torch.zeros(*lead, -(-n // TILE), -(-columns // 4) * 4, dtype=torch.float32, device=device)
    return Codes(torch.empty(shape, dtype=FP8, device=device), scales[..., :columns])


def quantize_tiles(x: Tensor, power_of_two: bool = False) -> Codes:
    """Quantises x [M, K], float32 or BF16, in 1×128 tiles."""
    m, k = x.shape
    out = new_codes(m, k, x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    if m * k:
        _rows[(-(-m // 32), -(-k // TILE))](
            x, *out, m, k, x.stride(0), out.scales.stride(1), power_of_two, 32, TILE, num_warps=4
        )
    return out


def quantize_both(x: Tensor, power_of_two: bool = False, tiles: Tiles | None = None) -> tuple[Codes, Codes]:
    """Quantises x [M, K] in 1×128 tiles, and xᵀ [K, 128 · T] with a scale for each 128 rows of x, reading x once.

    With `tiles`, no run of 128 rows spans two experts and T is the number of tiles; otherwise T is ceil(M / 128).
    """
    m, k = x.shape
    out, transposed = new_codes(m, k, x.device), new_transposed(m, k, tiles, x.device)
    _turn(x, out, transposed, tiles, power_of_two, m)
    return out, transposed


def turn_tiles(
    x: Tensor | Codes, power_of_two: bool = False, tiles: Tiles | None = None, index: Tensor | None = None
) -> Codes:
    """Only the transposed result of `quantize_both`, for rows `index` of x (None: all rows). x may be FP8 codes."""
    values = x if isinstance(x, Tensor) else x.codes
    m = values.shape[0] if index is None else index.numel()
    transposed = new_transposed(m, values.shape[1], tiles, values.device)
    _turn(x, None, transposed, tiles, power_of_two, m, index)
    return transposed


def round_e5m6(x: Tensor) -> Tensor:
    """Rounds x [..., C] to E5M6 with a power-of-two scale per 128 values; returns it in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(flat.shape[0], 32), triton.cdiv(flat.shape[1], TILE))
        _e5m6[grid](flat, out, *flat.shape, flat.stride(0), 32, TILE, num_warps=8)
    return out.view(x.shape)


def quantize_blocks(weight: Tensor, power_of_two: bool = False) -> Codes:
    """Quantises weight [.., N, K] in 128×128 blocks: scales [.., ceil(N / 128), ceil(K / 128)]."""
    out = new_blocks(weight.shape, weight.device)
    _launch_blocks(weight, out, None, power_of_two)
    return out


def quantize_blocks_both(weight: Tensor, power_of_two: bool = False) -> Blocks:
    """Like `quantize_blocks`, with the same codes transposed as well, for the input's gradient."""
    *lead, n, k = weight.shape
    out, turned = (new_blocks(torch.Size((*lead, *sides)), weight.device) for sides in ((n, k), (k, n)))
    _launch_blocks(weight, out, turned, power_of_two)
    return Blocks(*out, *turned)


def _launch_blocks(weight: Tensor, out: Codes, turned: Codes | None, power_of_two: bool) -> None:
    n, k = weight.shape[-2:]
    rows = weight.reshape(-1, n, k).contiguous()
    codes_t, scales_t = (None, None) if turned is None else turned
    if rows.numel():
        _blocks[(-(-k // TILE), -(-n // TILE), rows.shape[0])](
            rows, *out, codes_t, scales_t, n, k, out.scales.stride(-2), 0 if scales_t is None else scales_t.stride(-2),
            power_of_two, TILE, num_warps=BLOCK_WARPS,
        )  # fmt: skip


def _turn(
    x: Tensor | Codes,
    out: Codes | None,
    turned: Codes,
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
    count = -(-m // TILE) if tiles is None else tiles.start.numel()
    start, stop = (None, None) if tiles is None else (tiles.start, tiles.stop)
    codes, new_scales = (None, None) if out is None else out
    codes_t = turned.codes.view(torch.int32)
    _turned[(count, -(-k // TILE))](
        values, scales, index, codes, new_scales, codes_t, turned.scales, start, stop, m, k, values.stride(0),
        0 if scales is None else scales.stride(1), 0 if new_scales is None else new_scales.stride(1),
        codes_t.stride(0), turned.scales.stride(1), power_of_two, TILE, **TURN,
    )  # fmt: skip


@triton.jit
def _rows(
    x, codes, scales, M, K, stride_x, stride_s, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    rows, kb = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    columns = kb * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    v = known(tl.load(x + rows[:, None].to(tl.int64) * stride_x + columns[None, :], mask=inside, other=0.0))
    store_rows(v, codes, scales, rows, M, columns, K, kb, K, stride_s, POWER_OF_TWO)


@triton.jit
def _turned(
    x, x_scales, index, codes, scales, codes_t, scales_t, starts, stops, M, K,
    stride_x, stride_xs, stride_s, stride_t, stride_ts,
    POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Transposes 128 rows and columns. May be None: x_scales (x is not FP8 codes), index, and codes (no row-wise
    output)."""
    t, kb = tl.program_id(0), tl.program_id(1)
    start, stop = row_range(t, starts, stops, M, TILE)
    if start < stop:
        rows, columns = start + 4 * tl.arange(0, TILE // 4), kb * TILE + tl.arange(0, TILE)
        a = _load(x, x_scales, index, rows, stop, columns, K, kb, stride_x, stride_xs)
        b = _load(x, x_scales, index, rows + 1, stop, columns, K, kb, stride_x, stride_xs)
        c = _load(x, x_scales, index, rows + 2, stop, columns, K, kb, stride_x, stride_xs)
        d = _load(x, x_scales, index, rows + 3, stop, columns, K, kb, stride_x, stride_xs)
        if codes is not None:
            store_four(a, b, c, d, codes, scales, rows, stop, columns, K, kb, K, stride_s, POWER_OF_TWO)
        turn_four(a, b, c, d, codes_t, scales_t, t, columns, K, stride_t, stride_ts, POWER_OF_TWO, TILE)


@triton.jit
def _load(x, x_scales, index, rows, stop, columns, K, kb, stride_x, stride_xs):
    source = rows
    if index is not None:
        source = tl.load(index + rows, mask=rows < stop, other=0)
    inside = (rows[:, None] < stop) & (columns[None, :] < K)
    v = tl.load(x + source[:, None].to(tl.int64) * stride_x + columns[None, :], mask=inside, other=0.0)
    if x_scales is None:
        v = known(v)
    else:  # FP8 codes are never infinite
        v = v.to(tl.float32) * tl.load(x_scales + kb * stride_xs + source, mask=rows < stop, other=0.0)[:, None]
    return v


@triton.jit
def _e5m6(x, out, M, K, stride, ROWS: tl.constexpr, TILE: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    v = known(tl.load(x + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0))
    scale = tile_scale(largest(v, 1), True, E5M6_MAX)[:, None]
    rounded = on_grid(divide(v, scale, True), E5M6_MAX, 6, -14) * scale
    rounded = tl.where(v == v, rounded, v)
    tl.store(
        out + rows[:, None].to(tl.int64) * K + columns[None, :], narrow(rounded, out.dtype.element_ty), mask=inside
    )


@triton.jit
def row_range(t, starts, stops, M, ROWS: tl.constexpr):
    """First and end row of tile t: from the experts' table, or else ROWS rows per tile."""
    if starts is not None:
        start, stop = tl.load(starts + t), tl.load(stops + t)
    else:
        start = t * ROWS
        stop = tl.minimum(start + ROWS, M)
    return start, stop


@triton.jit
def store_rows(v, codes, scales, rows, stop, columns, limit, kb, stride, stride_s, POWER_OF_TWO: tl.constexpr):
    """Stores `known` v [rows, 128], zero outside, as codes with one scale per row, in column `kb` of the scales."""
    scale = tile_scale(largest(v, 1), POWER_OF_TWO)
    inside = (rows[:, None] < stop) & (columns[None, :] < limit)
    tl.store(
        codes + rows[:, None].to(tl.int64) * stride + columns[None, :],
        encode(v, scale[:, None], POWER_OF_TWO),
        mask=inside,
    )
    tl.store(scales + kb * stride_s + rows, scale, mask=rows < stop)


@triton.jit
def store_four(a, b, c, d, codes, scales, rows, stop, columns, limit, kb, stride, stride_s, POWER_OF_TWO: tl.constexpr):
    """Calls `store_rows` for four times 32 rows: `rows` + 0, 1, 2 and 3."""
    store_rows(a, codes, scales, rows, stop, columns, limit, kb, stride, stride_s, POWER_OF_TWO)
    store_rows(b, codes, scales, rows + 1, stop, columns, limit, kb, stride, stride_s, POWER_OF_TWO)
    store_rows(c, codes, scales, rows + 2, stop, columns, limit, kb, stride, stride_s, POWER_OF_TWO)
    store_rows(d, codes, scales, rows + 3, stop, columns, limit, kb, stride, stride_s, POWER_OF_TWO)


@triton.jit
def turn_four(
    a, b, c, d, codes, scales, t, columns, limit, stride, stride_s, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr
):
    """Stores 128 rows, given as rows 0, 4, 8 .., rows 1, 5 .., rows 2, .. and rows 3, .. of [32, 128] each, as
    transposed codes: columns 128 t to 128 (t + 1) of [limit, 128 T], with one scale per column of v.

    `codes` points to int32, so threads exchange four codes at a time, one from each of a, b, c and d.
    """
    ab, cd = tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d))
    scale = tile_scale(tl.max(tl.maximum(ab, cd), 0), POWER_OF_TWO)
    s = scale[None, :]
    q = encode_four(
        divide(a, s, POWER_OF_TWO), divide(b, s, POWER_OF_TWO), divide(c, s, POWER_OF_TWO), divide(d, s, POWER_OF_TWO)
    )
    places = t * (TILE // 4) + tl.arange(0, TILE // 4)
    tl.store(
        codes + columns[:, None].to(tl.int64) * stride + places[None, :], tl.trans(q), mask=columns[:, None] < limit
    )
    tl.store(scales + t * stride_s + columns, scale, mask=columns < limit)


@triton.jit
def _blocks(
    weight, codes, scales, codes_t, scales_t, N, K, stride_s, stride_ts, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr
):
    kb, nb, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = nb * TILE + tl.arange(0, TILE), kb * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    places = expert * N * K + rows[:, None].to(tl.int64) * K + columns[None, :]
    v = known(tl.load(weight + places, mask=inside, other=0.0))
    amax = tl.max(largest(v, 1), 0)
    scale = tile_scale(tl.full((TILE,), 0.0, tl.float32) + amax, POWER_OF_TWO)  # the same for each row
    tl.store(codes + places, encode(v, scale[:, None], POWER_OF_TWO), mask=inside)
    tl.store(scales + (expert * tl.num_programs(1) + nb) * stride_s + kb, tl.max(scale, 0))
    if codes_t is not None:
        # Reload the codes: ptxas 12.8 packs them for the store above and then reads single bytes from a dead register.
        tl.debug_barrier()
        q = tl.trans(tl.load(codes + places, mask=inside, other=0.0))
        places = expert * N * K + columns[:, None].to(tl.int64) * N + rows[None, :]
        tl.store(codes_t + places, q, mask=(columns[:, None] < K) & (rows[None, :] < N))
        tl.store(scales_t + (expert * tl.num_programs(0) + kb) * stride_ts + nb, tl.max(scale, 0))
