"""The GPU kernels of a serving step: row-invariant products, experts, and attention over the paged cache of latents.

Tiles keep one shape for any number of rows, and every sum has one order, so a row's bits do not depend on the rows that
share its step (ops/dispatch.py). FP8 weights are read as stored: each block's partial sum is scaled, then added in FP32
(3.3.2). Nothing here waits for the GPU.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton types a kernel's arguments)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.gpu.elementwise import swiglu_forward
from leanseek.gpu.numbers import INTERPRETED, narrow
from leanseek.ops.experts import Dispatched, rows_of
from leanseek.ops.formats import TILE
from leanseek.ops.grouped import Tiles, group_tiles
from leanseek.ops.latent_attention import CacheIndex
from leanseek.ops.weights import QuantizedWeight, StoredWeight

ROWS = 64  # rows of a product's tile
CHUNK = 256  # cached tokens per partial sum of attention
PARTIAL_BYTES = 2**28  # most bytes of partial sums at a time


# ---- products ----


def linear(x: Tensor, weight: StoredWeight) -> Tensor:
    """As ops.linear; weight of x's dtype, or FP8 blocks."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    _launch(flat, *_turned(weight), out)
    return out.view(*x.shape[:-1], -1)


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Like ops.head_linear: x [N, H, K], weight [H, K, R] -> [N, H, R]."""
    out = torch.empty(*x.shape[:2], weight.shape[2], dtype=x.dtype, device=x.device)
    _launch(x.transpose(0, 1), weight, None, out.transpose(0, 1))
    return out


def expert_products(sent: Dispatched, gate_up: StoredWeight, down: StoredWeight) -> Tensor:
    """As ops.experts.products_of_rows."""
    rows = rows_of(sent.x, sent.token)
    tiles = group_tiles(sent.ends, rows.shape[0], ROWS)
    hidden = rows.new_empty(rows.shape[0], gate_up.shape[1])
    _launch(rows, *_turned(gate_up), hidden, tiles)
    gate, up = hidden.chunk(2, dim=-1)
    out = torch.empty_like(rows)
    _launch(swiglu_forward(gate, up, sent.weights), *_turned(down), out, tiles)
    return out


def _turned(weight: StoredWeight) -> tuple[Tensor, Tensor | None]:
    """[.., out, in] as [.., in, out], and the scales of its blocks as they are stored."""
    if isinstance(weight, QuantizedWeight):
        return weight.data.mT, weight.scale
    return weight.mT, None


def _launch(x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor, tiles: Tiles | None = None) -> None:
    """x [.., M, K] · weight [.., K, N] into out [.., M, N]; with `tiles` the rows of x share the weights out."""
    (m, k), n = x.shape[-2:], weight.shape[-1]
    if not out.numel():
        return
    exact = x.dtype == torch.float32
    block_n = 16 if exact else 64  # a gate has few columns, and float32 products use no tensor cores
    row_blocks = triton.cdiv(m, ROWS) if tiles is None else tiles.start.numel()
    expert, start, stop, _ = (None,) * 4 if tiles is None else tiles
    batch = x.shape[0] if x.ndim == 3 else 1
    _product[(row_blocks * triton.cdiv(n, block_n), batch)](
        x, weight, scale, out, expert, start, stop, m, n, k,
        x.stride(0) if x.ndim == 3 else 0, x.stride(-2), _outer(weight), weight.stride(-2), weight.stride(-1),
        out.stride(0) if out.ndim == 3 else 0, out.stride(-2),
        0 if scale is None else _outer(scale), 0 if scale is None else scale.stride(-2),
        scale is not None, tiles is not None, exact, ROWS, block_n, TILE, num_warps=4, num_stages=2 if exact else 3,
    )  # fmt: skip


def _outer(stack: Tensor) -> int:
    return stack.stride(0) if stack.ndim == 3 else 0


@triton.jit
def _product(
    x, weight, scale, out, experts, starts, stops, M, N, K,
    stride_xb, stride_x, stride_wb, stride_wk, stride_wn, stride_ob, stride_o, stride_sb, stride_s,
    SCALED: tl.constexpr, GROUPED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """EXACT: float32 products without TF32. BLOCK_N divides the 128 columns that share a scale."""
    column_blocks = tl.cdiv(N, BLOCK_N)
    row_block, column_block = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    batch = tl.program_id(1).to(tl.int64)
    matrix, start, stop = batch, row_block * BLOCK_M, M
    if GROUPED:
        matrix = tl.load(experts + row_block).to(tl.int64)
        start, stop = tl.load(starts + row_block), tl.load(stops + row_block)
    if start < stop:
        rows, columns = start + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_row = x + batch * stride_xb + tl.minimum(rows, stop - 1)[:, None].to(tl.int64) * stride_x
        w_column = weight + matrix * stride_wb + tl.minimum(columns, N - 1)[None, :].to(tl.int64) * stride_wn
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, K, BLOCK_K):
            inside = first + k < K
            a = tl.load(x_row + (first + k)[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(w_column + (first + k)[:, None].to(tl.int64) * stride_wk, mask=inside[:, None], other=0.0)
            part = _dot(a, b, EXACT)
            if SCALED:
                block = column_block * BLOCK_N // BLOCK_K * stride_s + first // BLOCK_K
                part *= tl.load(scale + matrix * stride_sb + block)
            total += part
        places = out + batch * stride_ob + rows[:, None].to(tl.int64) * stride_o + columns[None, :]
        tl.store(places, narrow(total, out.dtype.element_ty), mask=(rows[:, None] < stop) & (columns[None, :] < N))


@triton.jit
def _dot(a, b, EXACT: tl.constexpr):
    """a · b with FP32 sums; FP8 codes in b are converted first."""
    if EXACT or INTERPRETED:  # the interpreter multiplies BF16 wrongly
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b.to(a.dtype))
    return product


# ---- attention ----


def latent_attention(q: Tensor, cache: Tensor, index: CacheIndex, scale: float, value_width: int) -> Tensor:
    """Like ops.latent_attention: each chunk of CHUNK keys gives a partial sum, and these are added in order."""
    n, heads = q.shape[:2]
    out = torch.empty(n, heads, value_width, dtype=q.dtype, device=q.device)
    chunks = triton.cdiv(index.pages.shape[1] * index.page_size, CHUNK)
    owner = torch.searchsorted(index.row_offsets[1:], torch.arange(n, device=q.device), right=True)
    at_once = max(1, PARTIAL_BYTES // (chunks * heads * value_width * 4))
    for rows in range(0, n, at_once):
        part = slice(rows, rows + at_once)
        _attend(q[part], cache, index, owner[part], index.positions[part], scale, chunks, out[part])
    return out


def _attend(
    q: Tensor,
    cache: Tensor,
    index: CacheIndex,
    owner: Tensor,
    positions: Tensor,
    scale: float,
    chunks: int,
    out: Tensor,
) -> None:
    n, heads, width = q.shape
    value_width = out.shape[2]
    sums = torch.empty(n, heads, chunks, value_width, dtype=torch.float32, device=q.device)
    maxima, masses = torch.empty(2, n, heads, chunks, dtype=torch.float32, device=q.device)
    exact = q.dtype == torch.float32
    block_h, block_c = 16, max(16, triton.next_power_of_2(value_width))
    _chunks[(n, triton.cdiv(heads, block_h), chunks)](
        q, cache, index.pages, owner, positions, sums, maxima, masses, scale, heads, value_width, width - value_width,
        index.pages.shape[1], index.page_size, chunks, q.stride(0), q.stride(1), cache.stride(0),
        exact, block_h, block_c, max(16, triton.next_power_of_2(width - value_width)), 32, CHUNK,
        num_warps=4, num_stages=2 if not exact else 1,
    )  # fmt: skip
    _join[(n, heads)](sums, maxima, masses, positions, out, chunks, value_width, block_c, CHUNK)


@triton.jit
def _chunks(
    q, cache, pages, owners, positions, sums, maxima, masses, scale, H, C, R, P, PAGE, chunks,
    stride_q, stride_h, stride_cache, EXACT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one new token over one chunk of its keys."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(2)
    position = tl.load(positions + row)
    if chunk * CHUNK <= position:
        heads, c, r = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
        q_row = q + row * stride_q + tl.minimum(heads, H - 1)[:, None] * stride_h
        q_c = tl.load(q_row + c[None, :], mask=c[None, :] < C, other=0.0)
        q_r = tl.load(q_row + C + r[None, :], mask=r[None, :] < R, other=0.0)
        table = pages + tl.load(owners + row) * P
        most, mass = tl.full((BLOCK_H,), -float("inf"), tl.float32), tl.zeros((BLOCK_H,), tl.float32)
        total = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
        for first in range(0, CHUNK, KEYS):  # the first block has a key, so `most` is finite after it
            key = chunk * CHUNK + first + tl.arange(0, KEYS)
            seen = key <= position
            slot = tl.load(table + key // PAGE, mask=seen, other=0) * PAGE + key % PAGE
            k_row = cache + slot.to(tl.int64)[:, None] * stride_cache
            k_c = tl.load(k_row + c[None, :], mask=seen[:, None] & (c[None, :] < C), other=0.0)
            k_r = tl.load(k_row + C + r[None, :], mask=seen[:, None] & (r[None, :] < R), other=0.0)
            scores = (_dot(q_c, tl.trans(k_c), EXACT) + _dot(q_r, tl.trans(k_r), EXACT)) * scale
            scores = tl.where(seen[None, :], scores, -float("inf"))
            larger = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp(scores - larger[:, None])
            shrink = tl.exp(most - larger)
            mass = mass * shrink + tl.sum(weights, 1)
            total = total * shrink[:, None] + _dot(narrow(weights, k_c.dtype), k_c, EXACT)
            most = larger
        place = (row * H + heads) * chunks + chunk
        tl.store(maxima + place, most, mask=heads < H)
        tl.store(masses + place, mass, mask=heads < H)
        tl.store(sums + place[:, None] * C + c[None, :], total, mask=(heads[:, None] < H) & (c[None, :] < C))


@triton.jit
def _join(sums, maxima, masses, positions, out, chunks, C, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr):
    """Adds the chunks of one head of one token, in order."""
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    used = (tl.load(positions + tl.program_id(0)) // CHUNK + 1).to(tl.int32)
    c = tl.arange(0, BLOCK_C)
    most = tl.load(maxima + place * chunks)
    for chunk in range(1, used):
        most = tl.maximum(most, tl.load(maxima + place * chunks + chunk))
    total, mass = tl.zeros((BLOCK_C,), tl.float32), 0.0
    for chunk in range(used):
        share = tl.exp(tl.load(maxima + place * chunks + chunk) - most)
        total += share * tl.load(sums + (place * chunks + chunk) * C + c, mask=c < C, other=0.0)
        mass += share * tl.load(masses + place * chunks + chunk)
    tl.store(out + place * C + c, narrow(total / mass, out.dtype.element_ty), mask=c < C)
