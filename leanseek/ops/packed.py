"""Weights as serving multiplies them: the stored bytes in another order, made once at load (native/kernels/stored.h).

Nothing is converted: FP8 stays FP8, and a weight takes the memory it took. Packed weights are for inference on the CPU
with native kernels; elsewhere there are none, and ops take weights as they are stored.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.dispatch import op
from leanseek.ops.experts import experts
from leanseek.ops.linear import BLOCK, dequantize_blocks, linear

PANEL, HALF = 64, 32  # rows of a panel, and of each half, which has scales of its own
INT8 = torch.uint8


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [rows, columns], or a stack of `count` of that shape."""

    data: Tensor  # [count, panels, pairs of columns, 64, 2] of the stored dtype
    scale: Tensor | None  # FP8: [count, panels, blocks of columns, 2] float32; INT8: [panels, 64]
    count: int
    rows: int
    columns: int
    checked: Tensor | None = None  # FP8: uint8 [count, panels], where kernels note whether a panel holds a NaN


class Place(enum.Enum):
    """Where a weight is packed; what takes another size in the new order is always packed apart."""

    APART = enum.auto()
    WITHIN = enum.auto()  # its own memory is put into the new order
    THERE = enum.auto()  # its own memory was put into that order before, and lies so


def pack(weight: Tensor, scale_inv: Tensor | None = None, place: Place = Place.APART) -> Packed:
    """weight [rows, columns] or [E, rows, columns] of any stored kind, its scales as in `linear`."""
    rows, columns = weight.shape[-2:]
    order = _order(rows, PANEL)
    stack = weight.reshape(-1, rows, columns)
    scale: Tensor | None = None
    if weight.dtype == INT8:
        assert scale_inv is not None
        scale = F.pad(scale_inv, (0, len(order) - rows)).view(-1, PANEL).contiguous()
    else:
        scale = (
            None if scale_inv is None else _half_scales(scale_inv.reshape(len(stack), -1, scale_inv.shape[-1]), order)
        )
    place = place if rows % PANEL == 0 and columns % 2 == 0 else Place.APART
    return _packed(stack, _addresses(stack, order), scale, rows, place=place)


def pack_gated(
    gate: Tensor, up: Tensor, scales: tuple[Tensor, Tensor] | None = None, place: Place = Place.APART
) -> Packed:
    """gate, up [I, D] or [E, I, D], panel by panel 32 rows of gate and the same rows of up; [E, 2I, D] as a weight.

    Only halves of one stack are packed other than apart.
    """
    size = gate.shape[-2]
    gates, ups = (w.reshape(-1, *w.shape[-2:]) for w in (gate, up))
    order = _order(size, HALF)
    rows = [_addresses(w, order).view(-1, HALF) for w in (gates, ups)]
    scale = None
    if scales is not None:
        halves = [_half_scales(s.reshape(len(gates), -1, s.shape[-1]), F.pad(order.view(-1, HALF), (0, HALF)).flatten())
                  for s in scales]  # fmt: skip
        scale = torch.stack((halves[0][..., 0], halves[1][..., 0]), -1).contiguous()
    one = up.data_ptr() == gate.data_ptr() + size * gate.shape[-1] * gate.element_size()
    place = place if one and size % HALF == 0 and gate.shape[-1] % 2 == 0 else Place.APART
    return _packed(gates, torch.cat(rows, 1).flatten(), scale, 2 * size, place=place, group=size // HALF)


def pack_heads(weight: Tensor, scale_inv: Tensor | None, heads: int, nope: int) -> tuple[Packed, Packed]:
    """kv_b_proj [H (nope + v), C] as the absorbed form takes it: W_UKᵀ [H, C, nope] and W_UV [H, v, C]."""
    if scale_inv is not None and (nope % PANEL or weight.shape[0] // heads % BLOCK):
        weight, scale_inv = dequantize_blocks(weight, scale_inv), None  # a block lies across heads
    stack = weight.view(heads, -1, weight.shape[1])
    c, v = weight.shape[1], stack.shape[1] - nope
    columns, values = _order(c, PANEL), _order(v, PANEL)
    by_column = torch.where(columns < 0, 0, stack.data_ptr() + columns * weight.element_size())
    uk_scale = uv_scale = None
    if scale_inv is not None:
        blocks = torch.arange(heads)[:, None] * stack.shape[1]
        of_nope = scale_inv[(blocks + torch.arange(0, nope, BLOCK)) // BLOCK]  # [H, blocks of nope, blocks of C]
        uk_scale = _half_scales(of_nope.transpose(1, 2), columns)
        first = (blocks + nope + values.view(-1, HALF)[:, 0].clamp_min(0)).clamp_max(weight.shape[0] - 1)
        uv_scale = scale_inv[first // BLOCK].unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
    uk = _packed(stack, by_column, uk_scale, c, columns=nope, stride=c)
    return uk, _packed(stack, _addresses(stack[:, nope:], values), uv_scale, v)


def _order(rows: int, side: int) -> Tensor:
    """Rows 0, 1, ... and -1 for none up to a multiple of `side`."""
    order = torch.arange(-(-rows // side) * side)
    order[rows:] = -1
    return order


def _half_scales(scale: Tensor, order: Tensor) -> Tensor:
    """scale [E, r, c] of 128 rows each -> [E, panels, c, 2] of the halves of panels with rows `order`."""
    blocks = order.view(-1, HALF)[:, 0].clamp_min(0) // BLOCK
    return scale.float()[:, blocks].unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def _addresses(stack: Tensor, order: Tensor) -> Tensor:
    """Of rows `order` of the first of stack [E, rows, columns]; 0 for none."""
    return torch.where(order < 0, 0, stack.data_ptr() + order * stack.shape[2] * stack.element_size())


def _packed(
    stack: Tensor,
    addresses: Tensor,
    scale: Tensor | None,
    rows: int,
    columns: int | None = None,
    stride: int = 1,
    place: Place = Place.APART,
    group: int = 1,
) -> Packed:
    """group: panels that are made of the memory they replace, where packed within."""
    columns = stack.shape[2] if columns is None else columns
    if place is Place.THERE:
        shape = (len(stack), addresses.numel() // PANEL, columns // 2, PANEL, 2)
        data = torch.as_strided(stack, shape, torch.empty(shape, device="meta").stride())
    else:
        data = pack_panels(stack, addresses, columns, stride, group if place is Place.WITHIN else 0)
    checked = torch.zeros(data.shape[:2], dtype=torch.uint8) if data.dtype == torch.float8_e4m3fn else None
    return Packed(data, scale, len(stack), rows, columns, checked)


@op("pack_panels")
def pack_panels(stack: Tensor, addresses: Tensor, columns: int, stride: int, group: int) -> Tensor:
    raise RuntimeError("weights are packed for native kernels only: ask can_pack first")


def can_pack(weight: Tensor) -> bool:
    """Whether native kernels multiply this weight, packed."""
    return pack_panels.backend(False, weight) != "torch"


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [count, rows, columns] in `dtype`, dequantised. `pack_gated` comes back in its panels' order."""
    panels = packed.data.shape[1]
    n = torch.arange(PANEL)
    place = n // 32 * 32 + n % 16 // 4 * 8 + n % 32 // 16 * 4 + n % 4 if packed.data.element_size() == 1 else n
    if packed.data.dtype == INT8:
        assert packed.scale is not None
        wide = (packed.data & 127).float() * torch.where(packed.data > 127, -1.0, 1.0)
        wide = wide[..., place, :] * packed.scale[:, None, :, None]
    else:
        wide = packed.data.float()[..., place, :]
        if packed.scale is not None:  # [.., blocks, 2] -> one for each pair of columns and row
            each = packed.scale.repeat_interleave(BLOCK // 2, 2)[:, :, : wide.shape[2]].repeat_interleave(HALF, 3)
            wide = wide * each[..., None]
    flat = wide.transpose(2, 3).reshape(packed.count, panels * PANEL, -1)
    return flat[:, : packed.rows, : packed.columns].to(dtype)


@op("packed_linear")
def packed_linear(x: Tensor, weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., columns] · weightᵀ in `dtype` (x's when None), for a weight that is no stack."""
    return linear(x, unpack(weight, x.dtype)[0]).to(dtype or x.dtype)


@op("packed_experts")
def packed_experts(x: Tensor, indices: Tensor, weights: Tensor, gated: Packed, down: Packed) -> Tensor:
    """As `experts`, with the stack of `pack_gated` and that of down."""
    halves = Packed(gated.data, gated.scale, gated.count, gated.data.shape[1] * PANEL, gated.columns)
    wide = unpack(halves, x.dtype).unflatten(1, (-1, 2, HALF))
    gate_up = torch.cat([wide[:, :, i].flatten(1, 2)[:, : gated.rows // 2] for i in (0, 1)], 1)
    return experts(x, indices, weights, gate_up, unpack(down, x.dtype))
