"""Block-scaled products for SM90 in Gluon: `gemm.py`'s three forms, with promotion to FP32 overlapped with the tensor
cores.

Plain Triton promotes while the tensor cores wait. Here, as in DeepGEMM, two warpgroups share a tile of 128×256, 64 rows
each, and naturally alternate: one promotes its partial sum of 128 columns while the other multiplies. A separate warp
keeps a ring of stages full with TMA, even across the tiles that a program (one per multiprocessor) works through. The
larger tile needs less L2 bandwidth: 171 operations per byte, against 128 at 128×128.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton types a kernel's arguments)
from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from leanseek.ops.formats import TILE
from leanseek.ops.grouped import Tiles
from leanseek.ops.operands import Codes

ONE, ROWS, SHARED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # which dimension is split among the experts
BLOCK = gl.constexpr(TILE)
HALVES, STAGES = 2, 4  # a tile is 128 × 128·HALVES; one stage takes 16 + 16·HALVES KiB
# Warps of each multiplying warpgroup; registers per thread before each group sets its own number
LAUNCH = {"num_warps": 4, "maxnreg": 168}
CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)

_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name before Triton 3.6


def takes(a: Codes, b: Codes) -> bool:
    """Whether TMA can read these: addresses and rows aligned to 16 bytes, scales stored column by column."""
    k = a.codes.shape[1]
    scales = (a.scales,) if b.scales.shape[-2] != b.codes.shape[-2] else (a.scales, b.scales)
    return (
        k % 16 == 0
        and a.codes.numel() > 0
        and b.codes.numel() > 0
        and a.codes.is_contiguous()
        and b.codes.is_contiguous()
        and all(x.data_ptr() % 16 == 0 for x in (a.codes, b.codes))
        and all(s.stride(0) == 1 and s.stride(1) % 4 == 0 and s.data_ptr() % 16 == 0 for s in scales)
    )


def product(a: Codes, b: Codes, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a · bᵀ [M, N], like `gemm.product`."""
    out = torch.empty(a.codes.shape[0], b.codes.shape[0], dtype=dtype, device=a.codes.device)
    _launch(a, b, out, None, ONE)
    return out


def grouped_product(a: Codes, b: Codes, tiles: Tiles, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Each expert's rows of a [M, K] times its bᵀ, b [E, N, K]: [M, N], like `gemm.grouped_product`."""
    out = torch.empty(a.codes.shape[0], b.codes.shape[1], dtype=dtype, device=a.codes.device)
    _launch(a, b, out, tiles, ROWS)
    return out


def grouped_weight_gradient(a: Codes, b: Codes, tiles: Tiles, dtype: torch.dtype = torch.float32) -> Tensor:
    """a_e · b_eᵀ over each expert's own tiles: [E, N, K], like `gemm.grouped_weight_gradient`."""
    n, k, n_experts = a.codes.shape[0], b.codes.shape[0], tiles.first.numel() - 1
    out = torch.empty(n_experts, n, k, dtype=dtype, device=a.codes.device)
    _launch(a, b, out, tiles, SHARED)
    return out


def _launch(
    a: Codes, b: Codes, out: Tensor, tiles: Tiles | None, group: gl.constexpr,
    halves: int = HALVES, stages: int = STAGES,
) -> None:  # fmt: skip
    (m, k), n = a.codes.shape, b.codes.shape[-2]
    per_block = b.scales.shape[-2] != n
    expert, start, stop, first = (None,) * 4 if tiles is None else tiles
    n_experts = 1 if tiles is None else tiles.first.numel() - 1
    row_blocks = tiles.start.numel() if tiles is not None and group.value == ROWS.value else triton.cdiv(m, TILE)
    work = row_blocks * triton.cdiv(n, TILE * halves) * (n_experts if group.value == SHARED.value else 1)
    _product[(min(work, _multiprocessors(out.device)),)](
        TensorDescriptor(a.codes, [m, k], [k, 1], [TILE // 2, TILE], CODES),
        TensorDescriptor(b.codes, [b.codes.numel() // k, k], [k, 1], [TILE, TILE], CODES),
        None if per_block else _column_scales(b.scales),
        a.scales, b.scales if per_block else None, out, expert, start, stop, first, m, n, k, n_experts,
        a.scales.stride(1), b.scales.stride(-2) if per_block else b.scales.stride(1), b.scales.stride(-1),
        b.scales.stride(0) if group.value == ROWS.value else 0,
        group.value, TILE if per_block else 1, halves, stages, **LAUNCH,
    )  # fmt: skip


def _column_scales(scales: Tensor) -> TensorDescriptor:
    """Row scales [N, K/128] as a 1-D tensor: one k-block after another, `stride(1)` apart."""
    n, blocks = scales.shape
    return TensorDescriptor(scales, [(blocks - 1) * scales.stride(1) + n], [1], [TILE], SCALES)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.jit(do_not_specialize=["M", "n_experts", "stride_sa", "stride_sb", "stride_sbk", "stride_sbe"])
def _product(
    a, b, sb_rows, sa, sb, out, experts, starts, stops, firsts, M, N, K, n_experts,
    stride_sa, stride_sb, stride_sbk, stride_sbe,
    GROUP: gl.constexpr, B_ROWS: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """B_ROWS: rows of b that share a scale, 128 or 1. Two warpgroups multiply, 64 rows of a tile each; a warp loads."""
    ring = _new_ring(B_ROWS, HALVES, STAGES)
    tables = (experts, starts, stops, firsts, M, N, K, n_experts)
    scales = (sa, sb, stride_sa, stride_sb, stride_sbk, stride_sbe)
    gl.warp_specialize(
        [
            (_multiply, (0, scales, out, ring, tables, GROUP, B_ROWS, HALVES, STAGES)),
            (_multiply, (1, scales, out, ring, tables, GROUP, B_ROWS, HALVES, STAGES)),
            (_load, (a, b, sb_rows, stride_sb, ring, tables, GROUP, B_ROWS, HALVES, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _new_ring(B_ROWS: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr):
    """Allocates the ring in shared memory. A slot holds a k-block of a tile: a for each warpgroup, b and its row scales
    for each half of the columns. One barrier tells when it is full, another when both warpgroups have read it."""
    a = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, BLOCK // 2, BLOCK], CODES)
    b = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * HALVES, BLOCK, BLOCK], CODES)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    sb = full
    if B_ROWS == 1:
        sb = gl.allocate_shared_memory(gl.float32, [STAGES * HALVES, BLOCK], SCALES)
    return a, b, sb, full, empty


@gluon.jit
def _load(
    a, b, sb_rows, stride_sb, ring, tables,
    GROUP: gl.constexpr, B_ROWS: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Runs in one warp: fills slots with the k-blocks of this program's tiles."""
    a_ring, b_ring, sb_ring, full, empty = ring
    BYTES: gl.constexpr = BLOCK * BLOCK * (1 + HALVES) + (BLOCK * 4 * HALVES if B_ROWS == 1 else 0)
    slot, phase = 0, 1
    row_blocks, column_blocks, works = _count(tables, GROUP, HALVES)
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        row, _, column, expert, kb_start, kb_stop = _place(work, tables, row_blocks, column_blocks, GROUP, HALVES)
        if GROUP == ROWS:
            column += expert * tables[5]
        for kb in range(kb_start, kb_stop):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(2):
                _copy(a, [row + i * (BLOCK // 2), kb * BLOCK], bar, a_ring.index(slot * 2 + i))
            for i in gl.static_range(HALVES):
                _copy(b, [column + i * BLOCK, kb * BLOCK], bar, b_ring.index(slot * HALVES + i))
                if B_ROWS == 1:
                    _copy(sb_rows, [kb * stride_sb + column + i * BLOCK], bar, sb_ring.index(slot * HALVES + i))
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _multiply(
    group, scales, out, ring, tables,
    GROUP: gl.constexpr, B_ROWS: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows 64 · group to 64 · (group + 1) of each tile, in one warpgroup. The other multiplies while it promotes."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    full, empty = ring[3], ring[4]
    never = tables[4] < 0
    slot, phase = 0, 0
    row_blocks, column_blocks, works = _count(tables, GROUP, HALVES)
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        row, stop, column, expert, kb_start, kb_stop = _place(work, tables, row_blocks, column_blocks, GROUP, HALVES)
        row += group * (BLOCK // 2)
        left = gl.zeros([BLOCK // 2, BLOCK], gl.float32, layout)
        right, part = left, left
        for kb in range(kb_start, kb_stop):
            scale = _row_scales(scales, row, stop, kb, layout)
            left_scale = _block_scale(scales, column, expert, kb, tables[5], B_ROWS)
            if HALVES == 2:
                right_scale = _block_scale(scales, column + BLOCK, expert, kb, tables[5], B_ROWS)
            mbarrier.wait(full.index(slot), phase)
            part = _part(part, never, ring, slot * 2 + group, slot * HALVES)
            if HALVES == 2:
                left = _promote(left, part, scale * left_scale, _column_scales_of(ring, slot * 2, layout, B_ROWS))
                part = _part(part, never, ring, slot * 2 + group, slot * 2 + 1)
            last_columns = _column_scales_of(ring, (slot + 1) * HALVES - 1, layout, B_ROWS)
            if B_ROWS == 1:
                fence_async_shared()
            mbarrier.arrive(empty.index(slot), count=1)
            if HALVES == 2:
                right = _promote(right, part, scale * right_scale, last_columns)
            else:
                left = _promote(left, part, scale * left_scale, last_columns)
            slot, phase = _next(slot, phase, STAGES)
        _store(left, out, row, stop, column, expert, tables, layout, GROUP)
        if HALVES == 2:
            _store(right, out, row, stop, column + BLOCK, expert, tables, layout, GROUP)


@gluon.jit
def _part(before, never, ring, a_place, b_place):
    """The product of a k-block, 64 rows of a and 128 rows of b, written over the previous part, `before`.

    Left alone, the compiler starts it in other registers while `before` is promoted, and spills. So we tell it that the
    sum continues if `never` is true: it cannot know that `never` is always false.
    """
    a, b = ring[0].index(a_place), ring[1].index(b_place).permute((1, 0))
    part = warpgroup_mma(a, b, before, use_acc=never, is_async=True)
    return warpgroup_mma_wait(0, deps=[part])


@gluon.jit
def _promote(total, part, scale, column_scale):
    """The wait waits for nothing. It keeps the compiler from starting the next product before this one's registers are
    free, which would spill."""
    return warpgroup_mma_wait(0, deps=[total + part * scale[:, None] * column_scale])


@gluon.jit
def _column_scales_of(ring, place, layout: gl.constexpr, B_ROWS: gl.constexpr):
    scale = 1.0
    if B_ROWS == 1:
        scale = ring[2].index(place).load(gl.SliceLayout(0, layout))[None, :]
    return scale


@gluon.jit
def _row_scales(scales, row, stop, kb, layout: gl.constexpr):
    rows = gl.minimum(row + gl.arange(0, BLOCK // 2, gl.SliceLayout(1, layout)), stop - 1)
    return gl.load(scales[0] + kb * scales[2] + rows)


@gluon.jit
def _block_scale(scales, column, expert, kb, N, B_ROWS: gl.constexpr):
    _, sb, _, stride_sb, stride_sbk, stride_sbe = scales
    scale = 1.0
    if B_ROWS == BLOCK:
        block = gl.minimum(column, N - 1) // BLOCK
        scale = gl.load(sb + expert.to(gl.int64) * stride_sbe + block * stride_sb + kb * stride_sbk)
    return scale


@gluon.jit
def _store(total, out, row, stop, column, expert, tables, layout: gl.constexpr, GROUP: gl.constexpr):
    M, N = tables[4], tables[5]
    rows = row + gl.arange(0, BLOCK // 2, gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    places = rows[:, None].to(gl.int64) * N + columns[None, :]
    if GROUP == SHARED:
        places += expert.to(gl.int64) * M * N
    inside = (rows[:, None] < stop) & (columns[None, :] < N)
    gl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _count(tables, GROUP: gl.constexpr, HALVES: gl.constexpr):
    """Number of block rows and block columns, and of tiles altogether."""
    _, _, _, firsts, M, N, _, n_experts = tables
    row_blocks = gl.cdiv(M, BLOCK)
    if GROUP == ROWS:
        row_blocks = gl.load(firsts + n_experts)
    column_blocks = gl.cdiv(N, BLOCK * HALVES)
    works = row_blocks * column_blocks
    if GROUP == SHARED:
        works *= n_experts
    return row_blocks, column_blocks, works


@gluon.jit
def _place(work, tables, row_blocks, column_blocks, GROUP: gl.constexpr, HALVES: gl.constexpr):
    """Where tile `work` is: first row, end row, first column, expert, first and end k-block."""
    experts, starts, stops, firsts, M, _, K, _ = tables
    row_block, column_block = _near_order(work % (row_blocks * column_blocks), row_blocks, column_blocks)
    expert = work // (row_blocks * column_blocks)
    row, stop, kb_start, kb_stop = row_block * BLOCK, M, 0, gl.cdiv(K, BLOCK)
    if GROUP == ROWS:
        expert = gl.load(experts + row_block)
        row, stop = gl.load(starts + row_block), gl.load(stops + row_block)
    if GROUP == SHARED:
        kb_start, kb_stop = gl.load(firsts + expert), gl.load(firsts + expert + 1)
    return row, stop, column_block * (BLOCK * HALVES), expert, kb_start, kb_stop


@gluon.jit
def _near_order(place, row_blocks, column_blocks):
    """Like `gemm._near_order`: gives programs that run together nearby blocks, so that they share the L2 cache."""
    SPAN: gl.constexpr = 8
    band = place // (SPAN * column_blocks)
    height = min(row_blocks - band * SPAN, SPAN)
    within = place % (SPAN * column_blocks)
    return band * SPAN + within % height, within // height


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)
