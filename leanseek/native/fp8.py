"""FP8 training's rounding, at the speed of a copy: operands hold q · scale in the compute type (fp8_quantise.cpp).

BF16 holds that exactly for power-of-two scales; for other scales the operands are float32. What each function does is
said in leanseek/ops/quantize.py; what is kept is (codes, scales).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from leanseek.native.library import DTYPES, accepts, implements, kernel, pointers
from leanseek.ops import quantize
from leanseek.ops.formats import TILE
from leanseek.ops.grouped import Groups
from leanseek.ops.operands import FP8, Kept
from leanseek.ops.quantize import Both, SwiGLUBackward

_rows = kernel("fp8_rows", "nnnn pn nn p ppp")
_wide = kernel("fp8_wide", "n pn p nn p")
_turn = kernel("fp8_turn", "nnn ppp pp nn pp")
_blocks = kernel("fp8_blocks", "nnn p nnn p ppp")
_swiglu = kernel("fp8_swiglu", "nnn pp nn ppp")
_swiglu_backward = kernel("fp8_swiglu_backward", "nnn p ppp p nn pppp")

E4M3, E5M6 = 0, 1  # fp8_quantise.cpp: FORMATS


def _values(shape: tuple[int, ...], dtype: torch.dtype, power_of_two: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype if power_of_two else torch.float32)


def _tiles(columns: int) -> int:
    return -(-columns // TILE)


@implements(quantize.rows, accepts)
def rows(x: Tensor, power_of_two: bool, fixed: Tensor | None = None) -> tuple[Tensor, Kept]:
    m, k = x.shape
    codes, scales = torch.empty(m, k, dtype=FP8), torch.empty(m, _tiles(k))
    values = _values((m, k), x.dtype, power_of_two)
    _rows(
        DTYPES[x.dtype], DTYPES[values.dtype], E4M3, int(power_of_two), x.data_ptr(), x.stride(0), m, k,
        *pointers(fixed, codes, scales, values),
    )  # fmt: skip
    return values, Kept(codes, scales)


@implements(quantize.round_e5m6, accepts)
def round_e5m6(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype)
    _rows(
        DTYPES[x.dtype], DTYPES[x.dtype], E5M6, 1, flat.data_ptr(), flat.stride(0), *flat.shape,
        None, None, None, out.data_ptr(),
    )  # fmt: skip
    return out


def _accepts_kept(x: Tensor | Kept, *_: object) -> bool:
    return accepts(x) if isinstance(x, Tensor) else x.codes.device.type == "cpu"


@implements(quantize.wide, lambda kept, dtype: _accepts_kept(kept) and dtype in DTYPES and kept.codes.stride(1) == 1)
def wide(kept: Kept, dtype: torch.dtype) -> Tensor:
    codes, scales = kept.codes, kept.scales.contiguous()
    out = torch.empty(codes.shape, dtype=dtype)
    _wide(DTYPES[dtype], codes.data_ptr(), codes.stride(0), scales.data_ptr(), *codes.shape, out.data_ptr())
    return out


@implements(quantize.turn, _accepts_kept)
def turn(
    x: Tensor | Kept, groups: Groups, power_of_two: bool, dtype: torch.dtype, index: Tensor | None = None
) -> Tensor:
    columns = (x if isinstance(x, Tensor) else x[0]).shape[1]
    out = _values((groups.rows, columns), dtype, power_of_two)
    _run_turn(x, groups.bands, power_of_two, index, None, out)
    return out


@implements(quantize.both, accepts)
def both(x: Tensor, groups: Groups, power_of_two: bool) -> Both:
    by_rows, turned = (_values(tuple(x.shape), x.dtype, power_of_two) for _ in range(2))
    _run_turn(x, groups.bands, power_of_two, None, by_rows, turned)
    return Both(by_rows, turned)


def _run_turn(
    x: Tensor | Kept, bands: Tensor, power_of_two: bool, index: Tensor | None, by_rows: Tensor | None, turned: Tensor
) -> None:
    wide, codes, scales = (x.contiguous(), None, None) if isinstance(x, Tensor) else (None, *x)
    dtype = turned.dtype if wide is None else wide.dtype
    _turn(
        DTYPES[dtype], DTYPES[turned.dtype], int(power_of_two), *pointers(wide, codes, scales, index, bands),
        bands.numel() - 1, turned.shape[1], *pointers(by_rows, turned),
    )  # fmt: skip


@implements(quantize.both_blocks, accepts)
def both_blocks(x: Tensor, groups: Groups, dtype: torch.dtype, halves: int = 1) -> Both:
    out = torch.empty(x.shape, dtype=dtype)
    for start, stop in pairwise([0, *groups.ends]):
        parts = x[start:stop].unflatten(-1, (halves, -1)).transpose(0, 1)
        out[start:stop].unflatten(-1, (halves, -1)).copy_(blocks(parts, True, dtype).transpose(0, 1))
    return Both(out, out)


@implements(quantize.blocks, accepts)
def blocks(weight: Tensor, power_of_two: bool, dtype: torch.dtype, fixed: Tensor | None = None) -> Tensor:
    weight = weight.contiguous()
    out = _values(tuple(weight.shape), dtype, power_of_two)
    _blocks(
        DTYPES[weight.dtype], DTYPES[out.dtype], int(power_of_two), weight.data_ptr(), *weight.shape,
        *pointers(fixed, None, None, out),
    )  # fmt: skip
    return out


@implements(quantize.quantize_blocks, accepts)
def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    weight = weight.contiguous()
    codes, scales = torch.empty(weight.shape, dtype=FP8), torch.empty(_tiles(rows), _tiles(columns))
    _blocks(
        DTYPES[weight.dtype], DTYPES[torch.float32], 0, weight.data_ptr(), 1, rows, columns,
        *pointers(None, codes, scales, None),
    )  # fmt: skip
    return codes, scales


@implements(quantize.swiglu, accepts)
def swiglu(hidden: Tensor, weight: Tensor | None, power_of_two: bool) -> tuple[Tensor, Kept]:
    m, i = hidden.shape[0], hidden.shape[1] // 2
    codes, scales = torch.empty(m, 2 * i, dtype=FP8), torch.empty(m, 2 * _tiles(i))
    act = _values((m, i), hidden.dtype, power_of_two)
    _swiglu(
        DTYPES[hidden.dtype], DTYPES[act.dtype], int(power_of_two), *pointers(hidden, weight), m, i,
        *pointers(codes, scales, act),
    )  # fmt: skip
    return act, Kept(codes, scales)


@implements(quantize.swiglu_backward, accepts)
def swiglu_backward(
    grad: Tensor, hidden: Kept, weight: Tensor | None, groups: Groups, power_of_two: bool
) -> SwiGLUBackward:
    bands = groups.bands
    m, i = grad.shape
    by_rows, turned, act = (_values((m, n), grad.dtype, power_of_two) for n in (2 * i, 2 * i, i))
    dweight = None if weight is None else torch.empty(m)
    _swiglu_backward(
        DTYPES[grad.dtype], DTYPES[act.dtype], int(power_of_two), grad.data_ptr(), *pointers(*hidden, weight, bands),
        bands.numel() - 1, i, *pointers(by_rows, turned, act, dweight),
    )  # fmt: skip
    return SwiGLUBackward(Both(by_rows, turned), act, dweight)
