"""How FP8 training quantises: activations by rows and turned, weights in blocks, SwiGLU on the way (3.3).

Each op has three forms. The native one (native/fp8.py) writes q · scale in the compute type, and products are
ordinary ones: with power-of-two scales BF16 holds q · scale exactly, so every single product is that of the codes. The
GPU's (gpu/training.py) hands on codes of one byte and scales, for its FP8 products. This one in torch hands on
both in float32, for products in the exact arithmetic (operands.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.dispatch import op
from leanseek.ops.formats import E5M6, TILE, encode, quantize, spread, tile_scale
from leanseek.ops.grouped import Groups
from leanseek.ops.operands import FP8, Activation, Coded, Kept, Weight, cuts
from leanseek.ops.swiglu import swiglu_gradient


class Both(NamedTuple):
    rows: Activation  # in 1×128 tiles
    turned: Activation  # in 128×1 tiles, the 128 being the rows of a band


class SwiGLUBackward(NamedTuple):
    hidden: Both  # gradient of the pre-activation [M, 2I]
    act: Activation  # the activation computed again, turned [M, I]
    weight: Tensor | None  # gradient of the rows' weights [M] float32


@op("fp8_rows")
def rows(x: Tensor, power_of_two: bool, fixed: Tensor | None = None) -> tuple[Activation, Kept]:
    """x [M, K] in 1×128 tiles: the operand, and what is kept. `fixed` is one scale for all of it."""
    q, scales = quantize(x, (1, TILE), power_of_two, fixed)
    return Coded(q, spread(scales, (1, TILE), x.shape), cuts(x.shape[1])), Kept(q.to(FP8), scales)


@op("fp8_wide")
def wide(kept: Kept, dtype: torch.dtype) -> Tensor:
    """The values that were kept, [rows, columns]."""
    return kept.wide().to(dtype)


@op("fp8_turn")
def turn(
    x: Tensor | Kept, groups: Groups, power_of_two: bool, dtype: torch.dtype, index: Tensor | None = None
) -> Activation:
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


@op("fp8_both_blocks")
def both_blocks(x: Tensor, groups: Groups, dtype: torch.dtype, halves: int = 1) -> Both:
    """As `both` with one power-of-two scale for 128 rows × 128 columns: the same codes serve both products.

    Each of `halves` equal parts of x's columns has blocks of its own. `dtype` is that of the compute.
    """
    padded = F.pad(x.float().unflatten(-1, (halves, -1)), (0, -(x.shape[1] // halves) % TILE))
    amax = torch.where(padded.isfinite(), padded, 0.0).abs().unflatten(-1, (-1, TILE)).amax(-1)  # [M, halves, c]
    band = torch.searchsorted(groups.bands, torch.arange(x.shape[0], device=x.device), right=True) - 1
    place = band[:, None, None].expand_as(amax)
    of_band = amax.new_zeros(groups.bands.numel(), *amax.shape[1:]).scatter_reduce_(0, place, amax, "amax")
    scale = tile_scale(of_band, True)[band].repeat_interleave(TILE, -1)[..., : x.shape[1] // halves].flatten(1)
    codes = encode(x, scale)
    return Both(Coded(codes, scale, cuts(x.shape[1], halves)), Coded(codes, scale))


@op("fp8_blocks")
def blocks(weight: Tensor, power_of_two: bool, dtype: torch.dtype, fixed: Tensor | None = None) -> Weight:
    """weight [E, rows, columns] in 128×128 blocks, as [E, rows, columns].

    `dtype` is that of the compute; `fixed` [E] are scales for whole matrices.
    """
    q, scales = quantize(weight, (TILE, TILE), power_of_two, None if fixed is None else fixed[:, None, None])
    return Coded(q, spread(scales, (TILE, TILE), q.shape))


@op("fp8_swiglu")
def swiglu(hidden: Tensor, weight: Tensor | None, power_of_two: bool) -> tuple[Activation, Kept]:
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
    dgate, dup, act, dweight = swiglu_gradient(*hidden_halves(hidden), weight, grad.float())
    dhidden = torch.cat((dgate, dup), dim=-1)
    codes, scales = _halves(dhidden, power_of_two)
    scale = spread(scales, (1, TILE), codes.shape).flatten(1)
    by_rows = Coded(codes.flatten(1), scale, cuts(dhidden.shape[1], halves=2))
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
