"""Block-scaled products: FP8 operands on the tensor cores, partial sums promoted to FP32 every 128 along K (3.3.2).

Each product is Σ over k-blocks of (a_block · b_blockᵀ) · sa · sb. Hopper's tensor cores keep about 14 bits within a
block of 128; the sum over blocks is FP32. One kernel has three forms: a single product, rows grouped by expert (forward
and the input's gradient), and the shared dimension grouped by expert (the weights' gradient).
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton types a kernel's arguments)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.gpu.numbers import narrow
from leanseek.ops.formats import TILE
from leanseek.ops.grouped import Tiles
from leanseek.ops.operands import Codes

ONE, ROWS, SHARED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # which dimension is split among the experts


def product(a: Codes, b: Codes, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a · bᵀ [M, N]: a [M, K] in 1×128 tiles; b [N, K] in 128×128 blocks with scales [ceil(N/128), ceil(K/128)], or in
    1×128 tiles too (for the weights' gradient)."""
    m, n = a.codes.shape[0], b.codes.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=a.codes.device)
    _launch(a, b, out, None, ONE, lambda c: (triton.cdiv(m, c["BLOCK_M"]) * triton.cdiv(n, c["BLOCK_N"]), 1))
    return out


def grouped_product(a: Codes, b: Codes, tiles: Tiles, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Each expert's rows of a [M, K] times its bᵀ, b [E, N, K] in blocks: [M, N]. Rows that belong to no expert stay
    uninitialised."""
    m, n = a.codes.shape[0], b.codes.shape[1]
    out = torch.empty(m, n, dtype=dtype, device=a.codes.device)
    _launch(a, b, out, tiles, ROWS, lambda c: (tiles.start.numel() * triton.cdiv(n, c["BLOCK_N"]), 1))
    return out


def grouped_weight_gradient(a: Codes, b: Codes, tiles: Tiles, dtype: torch.dtype = torch.float32) -> Tensor:
    """a_e · b_eᵀ over each expert's own tiles: a [N, 128·T], b [K, 128·T], transposed by `quantize_both`: [E, N, K].

    Experts without rows get zeros.
    """
    n, k, n_experts = a.codes.shape[0], b.codes.shape[0], tiles.first.numel() - 1
    out = torch.empty(n_experts, n, k, dtype=dtype, device=a.codes.device)
    _launch(
        a, b, out, tiles, SHARED, lambda c: (triton.cdiv(n, c["BLOCK_M"]) * triton.cdiv(k, c["BLOCK_N"]), n_experts)
    )
    return out


def _launch(a: Codes, b: Codes, out: Tensor, tiles: Tiles | None, group: tl.constexpr, grid: object) -> None:
    if not out.numel():
        return
    m, k = a.codes.shape
    n = b.codes.shape[-2]
    per_block = b.scales.shape[-2] != n
    expert, start, stop, first = (None,) * 4 if tiles is None else tiles
    grouped_b = group.value == ROWS.value
    _product[grid](
        a.codes, b.codes, a.scales, b.scales, out, expert, start, stop, first, m, n, k,
        a.codes.stride(0), b.codes.stride(-2), a.scales.stride(1), b.scales.stride(-2), b.scales.stride(-1),
        b.codes.stride(0) if grouped_b else 0, b.scales.stride(0) if grouped_b else 0,
        group.value, TILE if per_block else 1, k % TILE == 0, TILE,
    )  # fmt: skip


def _configs() -> list[triton.Config]:
    """For H100; none spills registers. A stage of 128×128×128 takes 32 of a multiprocessor's 227 KiB."""
    if triton.knobs.runtime.interpret:
        return [triton.Config({"BLOCK_M": 128, "BLOCK_N": 128})]
    shapes = [(128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 8, 4), (128, 64, 4, 4), (64, 128, 4, 4), (64, 128, 4, 3)]
    return [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in shapes]


def _fitting(configs: list[triton.Config], arguments: dict[str, object], **named: object) -> list[triton.Config]:
    """In the row-grouped form a program must take a whole tile of 128 rows."""
    whole = {**arguments, **named}["GROUP"] == ROWS.value
    return [c for c in configs if not whole or c.kwargs["BLOCK_M"] == TILE]


@triton.autotune(_configs(), key=["N", "K", "GROUP", "B_ROWS"], prune_configs_by={"early_config_prune": _fitting})
@triton.jit
def _product(
    a, b, sa, sb, out, experts, starts, stops, firsts, M, N, K,
    stride_a, stride_b, stride_sa, stride_sbn, stride_sbk, stride_be, stride_sbe,
    GROUP: tl.constexpr, B_ROWS: tl.constexpr, EVEN_K: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """B_ROWS: rows of b that share a scale, 128 or 1."""
    column_blocks = tl.cdiv(N, BLOCK_N)
    row_block, column_block = _near_order(tl.program_id(0), tl.num_programs(0) // column_blocks, column_blocks)
    expert = tl.program_id(1).to(tl.int64)
    start, stop, kb_start, kb_stop = row_block * BLOCK_M, M, 0, tl.cdiv(K, TILE)
    if GROUP == ROWS:
        expert = tl.load(experts + row_block).to(tl.int64)
        start, stop = tl.load(starts + row_block), tl.load(stops + row_block)
    if GROUP == SHARED:
        kb_start, kb_stop = tl.load(firsts + expert), tl.load(firsts + expert + 1)
    if start < stop:
        rows, columns = start + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows, in_columns = (
            tl.minimum(rows, stop - 1),
            tl.minimum(columns, N - 1),
        )  # re-reads the last one instead of masking
        k = tl.arange(0, TILE)
        a_row = a + in_rows[:, None].to(tl.int64) * stride_a + k[None, :]
        b_row = b + expert * stride_be + in_columns[None, :].to(tl.int64) * stride_b + k[:, None]
        sb_expert = sb + expert * stride_sbe
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for kb in range(kb_start, kb_stop):
            if EVEN_K:
                a_block, b_block = tl.load(a_row + kb * TILE), tl.load(b_row + kb * TILE)
            else:
                left = K - kb * TILE
                a_block = tl.load(a_row + kb * TILE, mask=k[None, :] < left, other=0.0)
                b_block = tl.load(b_row + kb * TILE, mask=k[:, None] < left, other=0.0)
            part = tl.dot(a_block, b_block)
            scale_a = tl.load(sa + kb * stride_sa + in_rows)
            if B_ROWS == TILE:  # one scale for all columns, because BLOCK_N divides 128
                scale_b = tl.load(sb_expert + column_block * BLOCK_N // TILE * stride_sbn + kb * stride_sbk)
                total += part * (scale_a * scale_b)[:, None]
            else:
                scale_b = tl.load(sb_expert + kb * stride_sbk + in_columns * stride_sbn)
                total += part * scale_a[:, None] * scale_b[None, :]
        places = rows[:, None].to(tl.int64) * N + columns[None, :]
        if GROUP == SHARED:
            places += expert * M * N
        inside = (rows[:, None] < stop) & (columns[None, :] < N)
        tl.store(out + places, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _near_order(place, row_blocks, column_blocks):
    """Gives programs that run together nearby blocks, eight block rows at a time, so that they share the L2 cache."""
    SPAN: tl.constexpr = 8
    band = place // (SPAN * column_blocks)
    height = tl.minimum(row_blocks - band * SPAN, SPAN)
    within = place % (SPAN * column_blocks)
    return band * SPAN + within % height, within // height
