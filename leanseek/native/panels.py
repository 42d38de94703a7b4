"""Weights as the kernels multiply them: the stored bytes in another order, made once at load (kernels/stored.h).

Nothing is converted: FP8 stays FP8, and a weight takes the memory it took. Products over panels are row-invariant: a
row's result does not depend on the rows it shares a call with.
"""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.machine.memory import empty
from leanseek.native.library import DTYPES, kernel, pointers, status, usable_variants
from leanseek.ops.dispatch import forced
from leanseek.ops.formats import TILE
from leanseek.ops.weights import FP8_BLOCKS, INT8_ROWS, QuantizedWeight, StoredWeight, WeightFormat

_pack = kernel("pack_panels", "np nnnnnn p")
_linear = kernel("packed_linear", "p np n p")

PANEL, HALF = 64, 32  # rows of a panel, and of each half, which has scales of its own
KINDS: dict[torch.dtype | WeightFormat, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    FP8_BLOCKS: 2,
    INT8_ROWS: 3,
}  # stored.h


@dataclass(frozen=True, eq=False)
class Panels:
    """A weight [rows, columns], or a stack of `count` of that shape."""

    kind: int  # of KINDS
    data: Tensor  # [count, panels, pairs of columns, 64, 2] of the stored dtype
    scale: Tensor | None  # FP8_BLOCKS: [count, panels, blocks of columns, 2] float32; INT8_ROWS: [panels, 64]
    count: int
    rows: int
    columns: int
    checked: Tensor | None  # FP8_BLOCKS: uint8 [count, panels], where kernels note whether a panel holds a NaN


class Place(enum.Enum):
    """Where a weight is packed; one that takes another size in the new order is always packed apart."""

    APART = enum.auto()
    WITHIN = enum.auto()  # its own memory is put into the new order
    THERE = enum.auto()  # its own memory is in that order already


class Matrix(ctypes.Structure):  # stored.h: Matrix
    _fields_ = [
        ("kind", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("checked", ctypes.c_void_p),
    ]


def matrix(weight: Panels) -> Matrix:
    """What a kernel reads of it; `weight` must outlive it."""
    checked = pointers(weight.checked)
    return Matrix(weight.kind, *pointers(weight.data, weight.scale), weight.rows, weight.columns, *checked)


def refusal(weight: StoredWeight | None = None) -> str:
    """Why this weight, or any, cannot be packed and multiplied here; empty where it can."""
    if not usable_variants():
        return f"native kernels: {status().detail}"
    if forced() not in (None, "native"):
        return f"another backend is forced: {forced()}"
    if weight is None:
        return ""
    if weight.device.type != "cpu":
        return f"a weight is on {weight.device.type}"
    if _kind(weight) not in KINDS:
        return f"no kernel multiplies {weight.format.name if isinstance(weight, QuantizedWeight) else weight.dtype}"
    return "" if weight.data.is_contiguous() else "a weight is not contiguous"


def _kind(weight: StoredWeight) -> torch.dtype | WeightFormat:
    return weight.format if isinstance(weight, QuantizedWeight) else weight.dtype


def pack(weight: StoredWeight, place: Place = Place.APART) -> Panels:
    """weight [rows, columns], or [E, rows, columns] in any form but INT8_ROWS."""
    rows, columns = weight.shape[-2:]
    order, stack = _order(rows, PANEL), weight.data.reshape(-1, rows, columns)
    scale = None
    if isinstance(weight, QuantizedWeight):
        if weight.format == INT8_ROWS:
            scale = F.pad(weight.scale, (0, len(order) - rows)).view(-1, PANEL).contiguous()
        else:
            scale = _half_scales(weight.scale, order)
    place = place if rows % PANEL == 0 and columns % 2 == 0 else Place.APART
    return _packed(_kind(weight), stack, _addresses(stack, order), scale, rows, place=place)


def pack_gated(gate: StoredWeight, up: StoredWeight) -> Panels:
    """gate, up [I, D] of one kind as a weight [2I, D]: panels of 32 rows of gate and the same rows of up."""
    scales = (gate.scale, up.scale) if isinstance(gate, QuantizedWeight) and isinstance(up, QuantizedWeight) else None
    return _gated(_kind(gate), (gate.data[None], up.data[None]), scales, Place.APART)


def pack_gated_stack(gate_up: StoredWeight, place: Place = Place.APART) -> Panels:
    """gate_up [E, 2I, D], gate rows first, as stacked `pack_gated`. 128 divides I where it is FP8."""
    scales = gate_up.scale.chunk(2, 1) if isinstance(gate_up, QuantizedWeight) else None
    return _gated(_kind(gate_up), gate_up.data.chunk(2, 1), scales, place)


def _gated(
    kind: torch.dtype | WeightFormat,
    halves: tuple[Tensor, ...],
    scales: tuple[Tensor, ...] | None,
    place: Place,
) -> Panels:
    """halves: gate and up [E, I, D], of one stack unless packed apart."""
    size, columns = halves[0].shape[1:]
    order = _order(size, HALF).view(-1, HALF)
    rows = [_addresses(half, order) for half in halves]
    scale = None
    if scales is not None:
        padded = F.pad(order, (0, HALF)).flatten()  # as if panels were of gate, or of up, alone
        scale = torch.stack([_half_scales(s, padded)[..., 0] for s in scales], -1).contiguous()
    place = place if size % HALF == 0 and columns % 2 == 0 else Place.APART
    return _packed(kind, halves[0], torch.cat(rows, 1), scale, 2 * size, place=place, group=size // HALF)


def pack_heads(weight: StoredWeight, heads: int, nope: int) -> tuple[Panels, Panels]:
    """kv_b_proj [H (nope + v), C] as the absorbed form takes it: W_UKᵀ [H, C, nope] and W_UV [H, v, C]."""
    if isinstance(weight, QuantizedWeight) and (nope % PANEL or weight.shape[0] // heads % TILE):
        weight = weight.dense(torch.float32)  # a block lies across heads
    kind, c = _kind(weight), weight.shape[1]
    stack = weight.data.view(heads, -1, c)
    v = stack.shape[1] - nope
    columns, values = _order(c, PANEL), _order(v, PANEL)
    by_column = torch.where(columns < 0, 0, stack.data_ptr() + columns * stack.element_size())
    uk_scale = uv_scale = None
    if isinstance(weight, QuantizedWeight):
        blocks = torch.arange(heads)[:, None] * stack.shape[1]
        of_nope = weight.scale[(blocks + torch.arange(0, nope, TILE)) // TILE]  # [H, blocks of nope, blocks of C]
        uk_scale = _half_scales(of_nope.transpose(1, 2), columns)
        first = (blocks + nope + values.view(-1, HALF)[:, 0].clamp_min(0)).clamp_max(weight.shape[0] - 1)
        uv_scale = weight.scale[first // TILE].unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
    uk = _packed(kind, stack, by_column, uk_scale, c, columns=nope, stride=c)
    return uk, _packed(kind, stack, _addresses(stack[:, nope:], values), uv_scale, v)


def _order(rows: int, side: int) -> Tensor:
    """Rows 0, 1, ... and -1 for none up to a multiple of `side`."""
    order = torch.arange(-(-rows // side) * side)
    order[rows:] = -1
    return order


def _half_scales(scale: Tensor, order: Tensor) -> Tensor:
    """scale [E, r, c] or [r, c] of 128 rows each -> [E, panels, c, 2] of the halves of panels with rows `order`."""
    blocks = order.view(-1, HALF)[:, 0].clamp_min(0) // TILE
    stack = scale.reshape(-1, *scale.shape[-2:])
    return stack.float()[:, blocks].unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def _addresses(stack: Tensor, order: Tensor) -> Tensor:
    """Addresses of rows `order` in the first matrix of stack [E, rows, columns]; 0 for no row."""
    return torch.where(order < 0, 0, stack.data_ptr() + order * stack.shape[2] * stack.element_size())


def _packed(
    kind: torch.dtype | WeightFormat,
    stack: Tensor,
    addresses: Tensor,
    scale: Tensor | None,
    rows: int,
    columns: int | None = None,
    stride: int = 1,
    place: Place = Place.APART,
    group: int = 1,
) -> Panels:
    """addresses: where each panel row starts, in the stack's first matrix. group: if packed in place, the number of
    panels that share the memory they replace."""
    columns = stack.shape[2] if columns is None else columns
    shape = (len(stack), addresses.numel() // PANEL, -(-columns // 2), PANEL, 2)
    if place is Place.APART:
        data, group = empty(shape, stack.dtype, stack.device), 0
    else:
        data = torch.as_strided(stack, shape, torch.empty(shape, device="meta").stride())
    if place is not Place.THERE:
        _pack(
            KINDS[kind], addresses.data_ptr(), shape[1], columns, stride, len(stack), stack.stride(0), group,
            data.data_ptr(),
        )  # fmt: skip
    checked = torch.zeros(data.shape[:2], dtype=torch.uint8) if kind == FP8_BLOCKS else None
    return Panels(KINDS[kind], data, scale, len(stack), rows, columns, checked)


def linear(x: Tensor, weight: Panels, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., columns] float32 or BF16 · weightᵀ in `dtype` (x's when None), for a weight that is no stack."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out, w = torch.empty(rows.shape[0], weight.rows), matrix(weight)
    _linear(ctypes.addressof(w), DTYPES[x.dtype], rows.data_ptr(), rows.shape[0], out.data_ptr())
    return out.to(dtype or x.dtype).view(*x.shape[:-1], weight.rows)
