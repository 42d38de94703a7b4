"""What FP8 products are fed with: operands, and what is kept of an activation for backward.

Each op has three forms. The native one (native/fp8.py) writes q · scale in the compute type, and products are
ordinary ones: with power-of-two scales BF16 holds q · scale exactly, so every single product is that of the codes. The
GPU's (gpu/training.py) hands on codes of one byte and scales, for its FP8 products. This one in torch hands on
both in float32, for products in the exact arithmetic (products.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.dispatch import op
from leanseek.ops.formats import E5M6, TILE, quantize, spread
from leanseek.ops.grouped import Groups

FP8 = torch.float8_e4m3fn


class Coded(NamedTuple):
    """An operand of the exact arithmetic: codes and the scale of each."""

    codes: Tensor  # [rows, columns] float32, on the grid of E4M3; weights have a dimension of experts before
    scale: Tensor  # of the same shape, float32

    def t(self) -> Coded:
        return Coded(self.codes.t(), self.scale.t())

    def view(self, *shape: int) -> Coded:
        return Coded(self.codes.view(shape), self.scale.view(shape))

    def transpose(self, a: int, b: int) -> Coded:
        return Coded(self.codes.transpose(a, b), self.scale.transpose(a, b))

    def take(self, rows: int | slice | Tensor) -> Coded:
        return Coded(self.codes[rows], self.scale[rows])


class Codes(NamedTuple):
    """x = codes · scales, E4M3 and float32: of rows, codes [M, K] with scales [M, ceil(K / 128)] that lie by columns;
    or of weights, [.., N, K] with scales [.., ceil(N / 128), ceil(K / 128)] that lie by rows."""

    codes: Tensor
    scales: Tensor

    def take(self, rows: Tensor) -> Codes:
        """Of rows: in another order, or several times."""
        found = new_codes(rows.numel(), self.codes.shape[1], self.codes.device)
        wide = torch.int64 if self.codes.shape[1] % 8 == 0 else torch.uint8  # copied 8 codes at a time
        torch.index_select(self.codes.view(wide), 0, rows, out=found.codes.view(wide))
        torch.index_select(self.scales.t(), 1, rows, out=found.scales.t())
        return found


class Blocks(NamedTuple):
    """Weights in 128×128 blocks: codes [.., N, K], scales [.., ceil(N / 128), ceil(K / 128)] float32; and the same
    turned, [.., K, N], because FP8 products read both operands along the side that is summed."""

    codes: Tensor
    scales: Tensor
    codes_t: Tensor
    scales_t: Tensor

    def take(self, expert: int) -> Blocks:
        return Blocks(*(t[expert] for t in self))

    def transpose(self, a: int, b: int) -> Blocks:
        return Blocks(self.codes_t, self.scales_t, self.codes, self.scales)

    def t(self) -> Blocks:
        return self.transpose(0, 1)


def new_codes(rows: int, columns: int, device: torch.device) -> Codes:
    """Room for codes and their scales; a column of scales starts at a multiple of 16 bytes."""
    scales = torch.empty(-(-columns // TILE), -(-rows // 4) * 4, dtype=torch.float32, device=device)
    return Codes(torch.empty(rows, columns, dtype=FP8, device=device), scales[:, :rows].t())


# A tensor holds q · scale; codes are a GPU's, blocks those of its weights.
Weight: TypeAlias = Tensor | Coded | Blocks
Operand: TypeAlias = Tensor | Coded | Codes | Blocks


class Kept(NamedTuple):
    """An activation as backward finds it: one byte a value."""

    codes: Tensor  # [rows, columns] E4M3
    scales: Tensor  # [rows, ceil(columns / 128)] float32

    def wide(self) -> Tensor:
        """[rows, columns] float32"""
        return self.codes.float() * spread(self.scales, (1, TILE), self.codes.shape)


@overload
def take(a: Weight, rows: int) -> Weight: ...
@overload
def take(a: Operand, rows: int | slice | Tensor) -> Operand: ...
def take(a: Operand, rows: int | slice | Tensor) -> Operand:
    if not isinstance(a, Tensor):
        return a.take(rows)  # type: ignore[arg-type]  # rows of codes by a tensor, experts of blocks by number
    return a.index_select(0, rows) if isinstance(rows, Tensor) else a[rows]


class Both(NamedTuple):
    rows: Operand  # in 1×128 tiles
    turned: Operand  # in 128×1 tiles, the 128 being the rows of a band


class SwiGLUBackward(NamedTuple):
    hidden: Both  # gradient of the pre-activation [M, 2I]
    act: Operand  # the activation computed again, turned [M, I]
    weight: Tensor | None  # gradient of the rows' weights [M] float32


@op("fp8_rows")
def rows(x: Tensor, power_of_two: bool, fixed: Tensor | None = None) -> tuple[Operand, Kept]:
    """x [M, K] in 1×128 tiles: the operand, and what is kept. `fixed` is one scale for all of it."""
    q, scales = quantize(x, (1, TILE), power_of_two, fixed)
    return Coded(q, spread(scales, (1, TILE), x.shape)), Kept(q.to(FP8), scales)


@op("fp8_turn")
def turn(
    x: Tensor | Kept, groups: Groups, power_of_two: bool, dtype: torch.dtype, index: Tensor | None = None
) -> Operand:
    """Rows `index` (all when None) of x [.., C] in 128×1 tiles: [M, C], a GPU's [C, ..] as its products read them.

    Runs of at most 128 rows of one group share a scale in each column. `dtype` is that of the compute.
    """
    wide = x.wide() if isinstance(x, Kept) else x
    if index is not None:
        wide = wide[index]
    codes, scale = torch.empty(wide.shape, device=wide.device), torch.empty(wide.shape, device=wide.device)
    for start, stop in pairwise(groups.bands.tolist()):
        q, scales = quantize(wide[start:stop], (TILE, 1), power_of_two)
        codes[start:stop], scale[start:stop] = q, scales
    return Coded(codes, scale)


@op("fp8_both")
def both(x: Tensor, groups: Groups, power_of_two: bool) -> Both:
    """`rows` and `turn` of x [M, C] in one pass."""
    return Both(rows.reference(x, power_of_two)[0], turn.reference(x, groups, power_of_two, x.dtype))


@op("fp8_blocks")
def blocks(weight: Tensor, power_of_two: bool, dtype: torch.dtype, fixed: Tensor | None = None) -> Weight:
    """weight [E, rows, columns] in 128×128 blocks, as [E, rows, columns]. `dtype` is that of the compute."""
    q, scales = quantize(weight, (TILE, TILE), power_of_two, fixed)
    return Coded(q, spread(scales, (TILE, TILE), q.shape))


@op("fp8_swiglu")
def swiglu(hidden: Tensor, weight: Tensor | None, power_of_two: bool) -> tuple[Operand, Kept]:
    """hidden [M, 2I], gate then up -> (w · silu(gate) · up in 1×128 tiles [M, I], hidden as it is kept).

    weight [M] float32. Gate and up have tiles of their own.
    """
    gate, up = hidden.float().chunk(2, dim=-1)
    act = F.silu(gate) * up
    codes, scales = _halves(hidden, power_of_two)
    operand, _ = rows.reference(act if weight is None else act * weight[:, None], power_of_two)
    return operand, Kept(codes.flatten(1).to(FP8), scales.flatten(1))


@op("fp8_swiglu_backward")
def swiglu_backward(
    grad: Tensor, hidden: Kept, weight: Tensor | None, groups: Groups, power_of_two: bool
) -> SwiGLUBackward:
    """grad [M, I] of the activation, and the hidden that was kept, as the four products of backward take them."""
    dgate, dup, act, dweight = swiglu_gradient(grad, hidden, weight)
    dhidden = torch.cat((dgate, dup), dim=-1)
    codes, scales = _halves(dhidden, power_of_two)
    by_rows = Coded(codes.flatten(1), spread(scales, (1, TILE), codes.shape).flatten(1))
    turned, act_turned = (turn.reference(x, groups, power_of_two, grad.dtype) for x in (dhidden, act))
    return SwiGLUBackward(Both(by_rows, turned), act_turned, dweight)


@op("fp8_e5m6")
def round_e5m6(x: Tensor) -> Tensor:
    """x [..., C] as E5M6 with power-of-two scales holds it, in x's dtype: BF16 holds all of them exactly."""
    flat = x.reshape(-1, x.shape[-1])
    q, scales = quantize(flat, (1, TILE), True, fmt=E5M6)
    return (q * spread(scales, (1, TILE), flat.shape)).to(x.dtype).view(x.shape)


@op("fp8_stored_blocks")
def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [rows, columns] -> q E4M3, scale_inv [ceil(rows/128), ceil(columns/128)] float32: as published."""
    q, scales = quantize(weight, (TILE, TILE), power_of_two=False)
    return q.to(FP8), scales


def _halves(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x [M, 2I], gate then up with tiles of their own -> q [M, 2, I] and scales [M, 2, ceil(I / 128)], `quantize`d."""
    return quantize(x.unflatten(-1, (2, -1)), (1, TILE), power_of_two)


def hidden_halves(hidden: Kept) -> tuple[Tensor, Tensor]:
    """gate and up [M, I] float32 of a kept pre-activation."""
    codes, scales = hidden.codes.chunk(2, dim=-1), hidden.scales.chunk(2, dim=-1)
    return Kept(codes[0], scales[0]).wide(), Kept(codes[1], scales[1]).wide()


def swiglu_gradient(grad: Tensor, hidden: Kept, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Before any rounding, float32: gradients of gate and up [M, I], the weighted activation, the weights' gradient."""
    gate, up = hidden_halves(hidden)
    sig, grad = torch.sigmoid(gate), grad.float()
    silu = gate * sig
    act = silu * up
    dweight = None
    if weight is not None:
        dweight = (grad * act).sum(-1)
        act, grad = act * weight[:, None], grad * weight[:, None]
    return grad * up * (sig + silu * (1 - sig)), grad * silu, act, dweight
