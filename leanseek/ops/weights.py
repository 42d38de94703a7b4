"""Weights of fewer bits: what is stored, its scales, and the format that says which values the two stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from leanseek.ops.dispatch import op
from leanseek.ops.formats import TILE


@dataclass(frozen=True)
class WeightFormat:
    """How a weight [..., out, in] is stored.

    A new one (4-bit groups) is one more of the constants below: everything else asks the format. Two values a byte
    would have `QuantizedWeight.shape` ask it too. Where kernels should read it, they number it (`native.panels.KINDS`)
    and its reader stands in stored.h; until then torch multiplies by what `dense` returns.
    """

    name: str
    dtype: torch.dtype  # of the stored values
    scale_shape: Callable[[Sequence[int]], tuple[int, ...]]  # of the scales of a weight of this shape
    dense: Callable[[Tensor, Tensor, torch.dtype], Tensor]  # stored values, scales -> the weight in a dtype


def dequantize_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """w = q · scale per 128×128 block (3.3.2).

    weight [..., out, in] FP8; scale [..., ceil(out/128), ceil(in/128)]. Returns [..., out, in] in `dtype`.
    Dimensions that 128 does not divide have a last, smaller block.
    """
    rows, columns = weight.shape[-2:]
    wide = scale.float().repeat_interleave(TILE, -2)[..., :rows, :]
    wide = wide.repeat_interleave(TILE, -1)[..., :columns]
    return weight.float().mul_(wide).to(dtype)


def _dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    magnitude = (codes & 127).float() * scale[..., None]
    return torch.where(codes > 127, -magnitude, magnitude).to(dtype)


FP8_BLOCKS = WeightFormat(  # E4M3, one float32 scale for each 128×128 block, as published
    "fp8-blocks",
    torch.float8_e4m3fn,
    lambda shape: (*shape[:-2], -(-shape[-2] // TILE), -(-shape[-1] // TILE)),
    dequantize_blocks,
)
INT8_ROWS = WeightFormat(  # a sign bit and 7 bits of magnitude, one float32 scale a row
    "int8-rows", torch.uint8, lambda shape: tuple(shape[:-1]), _dequantize_rows
)
FORMATS = {each.name: each for each in (FP8_BLOCKS, INT8_ROWS)}


class QuantizedWeight(nn.Module):
    """A weight [out, in], or a stack of them [E, out, in], for inference: no gradient reaches it.

    It takes the place of a parameter: it moves, is copied and is saved with the module whose weight it is. A cast of
    that module leaves it as it is stored.

    Raises:
        ValueError: data or scales are not the format's.
    """

    data: Tensor
    scale: Tensor

    def __init__(self, data: Tensor, scale: Tensor, format: WeightFormat):
        super().__init__()
        if data.dtype != format.dtype or tuple(scale.shape) != format.scale_shape(data.shape):
            raise ValueError(
                f"{data.dtype} {list(data.shape)} with scales {list(scale.shape)} is not a weight in {format.name}"
            )
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.format = format

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __getitem__(self, index: int) -> QuantizedWeight:
        """One of a stack."""
        return QuantizedWeight(self.data[index], self.scale[index], self.format)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight's values in `dtype`."""
        return self.format.dense(self.data, self.scale, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        for name, stored in list(self._buffers.items()):
            moved: Any = fn(stored)  # type: ignore[arg-type]
            self._buffers[name] = moved if moved.dtype == stored.dtype else stored.to(moved.device)  # type: ignore[union-attr]
        return self


StoredWeight: TypeAlias = Tensor | QuantizedWeight


def dense(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """A weight's values in `dtype`."""
    return weight.dense(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


@op("quantize_rows")
def quantize_rows(weight: Tensor) -> QuantizedWeight:
    """weight [out, in] in INT8_ROWS.

    BF16 holds every code exactly, and -0 is as good as 0. A row with a NaN or an infinity has the scale NaN: none of
    it is a number.
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
    return QuantizedWeight(codes, torch.cat(scales), INT8_ROWS)


def replace_weight(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Put a quantised weight in the place of a module's parameter."""
    delattr(module, name)  # torch puts no module where a parameter is
    setattr(module, name, weight)


def named_weights(module: nn.Module) -> dict[str, StoredWeight]:
    """All that a state dict holds, without gradients, with each quantised weight whole under its parameter's name."""
    quantized = {name: inner for name, inner in module.named_modules() if isinstance(inner, QuantizedWeight)}
    plain = {name: t for name, t in module.state_dict().items() if name.rpartition(".")[0] not in quantized}
    return plain | quantized
