"""The linear layer over full-precision and FP8 block weights."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.ops import products
from leanseek.ops.dispatch import op

BLOCK = 128  # side of a weight block that shares one scale (3.3)


@op("linear")
def linear(x: Tensor, weight: Tensor, scale_inv: Tensor | None = None) -> Tensor:
    """x · weightᵀ in x's dtype.

    x [..., in]; weight [out, in], of any floating dtype (cast to x's: master weights stay float32 under BF16 compute),
    or float8_e4m3fn with scale_inv [ceil(out/128), ceil(in/128)] float32, or what `quantize_rows` returns.
    """
    return products.linear(x, dense(weight, scale_inv, x.dtype))


def dense(weight: Tensor, scale_inv: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A stored weight in `dtype`."""
    if scale_inv is None:
        return weight.to(dtype)
    return (dequantize_rows if weight.dtype == torch.uint8 else dequantize_blocks)(weight, scale_inv, dtype)


@op("quantize_rows")
def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits a value, one scale a row: weight [out, in] -> codes [out, in] uint8, scale_inv [out] float32.

    A code is a sign bit and 7 bits of magnitude, so that BF16 holds every code exactly and -0 is as good as 0. A row
    with a NaN or an infinity has the scale NaN: none of it is a number.
    """
    codes, scales = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), []
    for part, out in zip(weight.split(4096), codes.split(4096), strict=True):  # a part at a time: heads are large
        wide = part.float()
        scale = wide.abs().amax(-1) / 127
        scale[~scale.isfinite()] = torch.nan
        wide /= torch.where(scale > 0, scale, 1.0)[:, None]
        wide[scale.isnan()] = 0.0
        out.copy_(wide.abs().round() + 128 * (wide < 0))
        scales.append(scale)
    return codes, torch.cat(scales)


def dequantize_rows(codes: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `quantize_rows`."""
    magnitude = (codes & 127).float() * scale_inv[:, None]
    return torch.where(codes > 127, -magnitude, magnitude).to(dtype)


def dequantize_blocks(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """w = q · scale_inv per 128×128 block (3.3.2).

    weight [..., out, in] FP8; scale_inv [..., ceil(out/128), ceil(in/128)]. Returns [..., out, in] in `dtype`.
    Dimensions that 128 does not divide have a last, smaller block.
    """
    rows, columns = weight.shape[-2:]
    scale = scale_inv.float().repeat_interleave(BLOCK, -2)[..., :rows, :]
    scale = scale.repeat_interleave(BLOCK, -1)[..., :columns]
    return (weight.float() * scale).to(dtype)
