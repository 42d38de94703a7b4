"""Serving's ops over packed weights (FP8 blocks, INT8 rows, BF16, FP32), and attention over the latent cache.

All of them are row-invariant: a row's result does not depend on the rows it shares a call with.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanseek import ops
from leanseek.machine.memory import empty
from leanseek.native.library import DTYPES, implements, kernel, pointers
from leanseek.ops import packed
from leanseek.ops.dispatch import Rows
from leanseek.ops.latent_attention import CacheIndex
from leanseek.ops.packed import PANEL, Packed

_pack = kernel("pack_panels", "np nnnnnn p")
_quantize_rows = kernel("quantize_rows", "np nn pp")
_linear = kernel("packed_linear", "p np n p")
_experts = kernel("packed_experts", "pp n np pp nn p")
_attention = kernel("latent_attention", "np nnn ppp nnn np n f p")

KINDS = DTYPES | {torch.float8_e4m3fn: 2, torch.uint8: 3}  # stored.h


class Matrix(ctypes.Structure):  # stored.h: Matrix
    _fields_ = [
        ("kind", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("checked", ctypes.c_void_p),
    ]


def matrix(weight: Packed) -> Matrix:
    """What a kernel reads of it; `weight` must outlive it."""
    kind, checked = KINDS[weight.data.dtype], pointers(weight.checked)
    return Matrix(kind, *pointers(weight.data, weight.scale), weight.rows, weight.columns, *checked)


def _packs(weight: Tensor, *_: object) -> bool:
    rows = weight.stride()[-2:] == (weight.shape[-1], 1) or weight.is_contiguous()  # a part of a stack will do
    return weight.device.type == "cpu" and weight.dtype in KINDS and rows


@implements(packed.pack_panels, _packs, Rows.BOTH)
def pack_panels(stack: Tensor, addresses: Tensor, columns: int, stride: int, group: int) -> Tensor:
    shape = (len(stack), addresses.numel() // PANEL, -(-columns // 2), PANEL, 2)
    out = stack if group else empty(shape, stack.dtype, stack.device)
    _pack(
        KINDS[stack.dtype], addresses.data_ptr(), shape[1], columns, stride, len(stack), stack.stride(0), group,
        out.data_ptr(),
    )  # fmt: skip
    return torch.as_strided(out, shape, torch.empty(shape, device="meta").stride()) if group else out


@implements(ops.quantize_rows, lambda weight: weight.dtype in DTYPES and _packs(weight))
def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(len(weight))
    _quantize_rows(DTYPES[weight.dtype], weight.data_ptr(), *weight.shape, *pointers(codes, scale))
    return codes, scale


def _multiplies(x: Tensor, *_: object) -> bool:
    return x.device.type == "cpu" and x.dtype in DTYPES


@implements(ops.packed_linear, _multiplies, Rows.BOTH)
def packed_linear(x: Tensor, weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out, w = torch.empty(rows.shape[0], weight.rows), matrix(weight)
    _linear(ctypes.addressof(w), DTYPES[x.dtype], rows.data_ptr(), rows.shape[0], out.data_ptr())
    return out.to(dtype or x.dtype).view(*x.shape[:-1], weight.rows)


@implements(ops.packed_experts, _multiplies, Rows.BOTH)
def packed_experts(x: Tensor, indices: Tensor, weights: Tensor, gated: Packed, down: Packed) -> Tensor:
    rows, indices, weights = x.contiguous(), indices.contiguous(), weights.float().contiguous()
    out, w_up, w_down = torch.empty(rows.shape), matrix(gated), matrix(down)
    _experts(
        ctypes.addressof(w_up), ctypes.addressof(w_down), gated.count, DTYPES[x.dtype], rows.data_ptr(),
        indices.data_ptr(), weights.data_ptr(), *indices.shape, out.data_ptr(),
    )  # fmt: skip
    return out.to(x.dtype)


def _cached(q: Tensor, cache: Tensor, *_: object) -> bool:
    return q.device.type == "cpu" and cache.dtype in DTYPES and cache.is_contiguous()


@implements(ops.latent_attention, _cached, Rows.BOTH)
def latent_attention(q: Tensor, cache: Tensor, index: CacheIndex, scale: float, value_width: int) -> Tensor:
    tokens, heads, width = q.shape
    rows = q.float().contiguous()
    out = torch.empty(tokens, heads, value_width)
    pages = index.pages.contiguous()
    _attention(
        DTYPES[cache.dtype], cache.data_ptr(), width, value_width, index.page_size, index.positions.data_ptr(),
        index.row_offsets.data_ptr(), pages.data_ptr(), tokens, *pages.shape, q.dtype == torch.bfloat16,
        rows.data_ptr(), heads, scale, out.data_ptr(),
    )  # fmt: skip
    return out.to(q.dtype)
