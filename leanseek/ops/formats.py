"""The number formats of FP8 training and how a tensor is put into one: a scale a tile, a code a value (3.3).

Plain torch, for any device; what the native kernels do is held to this, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128  # values that share a scale, and products that are summed before they are scaled (3.3.2)


class Format(NamedTuple):
    """A small floating-point format with subnormals, without infinities in use."""

    number: int  # as fp8_quantise.cpp counts them
    largest: float
    smallest_normal: float
    mantissa_bits: int


E4M3 = Format(0, 448.0, 2.0**-6, 3)
E5M6 = Format(1, 65024.0, 2.0**-14, 6)  # the paper's own, 12 bits: for what the attention's backward reads as well


class Counts(NamedTuple):
    """What a quantisation lost, in numbers of values."""

    saturated: int  # beyond the largest code, or not finite
    underflowed: int  # not zero, but coded as zero
    total: int


def tile_scale(amax: Tensor, power_of_two: bool, fmt: Format = E4M3) -> Tensor:
    """amax / largest, or the next power of two (ue8m0), so that nothing saturates; 1 for a tile of zeros."""
    scale = amax.float() / fmt.largest
    if power_of_two:  # a mantissa with any bit set carries into the exponent
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(scale > 0, scale, 1.0)


def encode(x: Tensor, scale: Tensor, fmt: Format = E4M3) -> Tensor:
    """x / scale rounded to the format (nearest, ties to even), saturated; float32. What is not finite becomes NaN."""
    q = (x.float() / scale).clamp(-fmt.largest, fmt.largest)
    power = (q.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(fmt.smallest_normal)
    magic = power * (1.5 * 2.0 ** (23 - fmt.mantissa_bits))  # its last bit is the step between neighbours at q
    rounded = torch.copysign((q + magic) - magic, q)
    return torch.where(x.isfinite(), rounded, torch.nan)


def quantize(
    x: Tensor, tile: tuple[int, int], power_of_two: bool, fixed: Tensor | None = None, fmt: Format = E4M3
) -> tuple[Tensor, Tensor]:
    """x [..., rows, columns] -> q of its shape, float32 on the format's grid, and scales, one a tile [..., r, c].

    x ≈ q · scale. The last tiles of a row and a column may be smaller. Values that are not finite do not count for
    their tile's scale. `fixed` is a scale for all tiles.
    """
    rows, columns = x.shape[-2:]
    padded = F.pad(x.float(), (0, -columns % tile[1], 0, -rows % tile[0]))
    grid = padded.unflatten(-1, (-1, tile[1])).unflatten(-3, (-1, tile[0]))  # [..., r, tile rows, c, tile columns]
    amax = torch.where(grid.isfinite(), grid, 0.0).abs().amax((-3, -1))
    scales = tile_scale(amax, power_of_two, fmt) if fixed is None else fixed.expand(amax.shape).contiguous()
    return encode(x, spread(scales, tile, x.shape), fmt), scales


def spread(scales: Tensor, tile: tuple[int, int], shape: torch.Size) -> Tensor:
    """scales [..., r, c] -> the scale of each value, of `shape`."""
    rows, columns = shape[-2:]
    return scales.repeat_interleave(tile[0], -2)[..., :rows, :].repeat_interleave(tile[1], -1)[..., :columns]


def counts(x: Tensor, scale: Tensor) -> Counts:
    """What E4M3 with these scales (one for each value, or one that broadcasts) loses of x."""
    over = (x.float().abs() > E4M3.largest * scale) | ~x.isfinite()
    gone = (encode(x, scale) == 0) & (x != 0)
    return Counts(int(over.sum()), int(gone.sum()), x.numel())
