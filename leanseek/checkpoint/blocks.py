"""FP8 block weights as published (3.3): 128×128 blocks in E4M3, one `weight_scale_inv` a block, w = q · scale_inv."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from leanseek import ops
from leanseek.checkpoint.files import CheckpointError, Lazy
from leanseek.checkpoint.names import SCALE, is_quantized
from leanseek.ops.formats import TILE as BLOCK
from leanseek.ops.quantize import quantize_blocks
from leanseek.ops.weights import FP8_BLOCKS
from leanseek.reading import Structure, checked, shorten

FP8 = torch.float8_e4m3fn
QUANTIZATION_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


class _Described(Protocol):
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes of a weight that needs no scales
_SCALES = (*WIDE, torch.float8_e8m0fnu)


def check_blocks(tensors: Mapping[str, _Described]) -> None:
    """Every FP8 matrix has scales of the right shape and dtype, and no scales are without their FP8 matrix.

    Raises:
        CheckpointError: it is not so, or a tensor has a dtype that is no weight's.
    """
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            weight = tensors.get(name.removesuffix(SCALE))
            if weight is not None and weight.dtype != FP8:
                raise CheckpointError(
                    f"{name} are scales of FP8 blocks, but {name.removesuffix(SCALE)} is {_name(weight.dtype)}"
                )
        elif tensor.dtype == FP8:
            _check_scales(name, tensor, tensors.get(name + SCALE))
        elif tensor.dtype not in WIDE:
            raise CheckpointError(
                f"{name} is stored as {_name(tensor.dtype)}; weights are float32, bfloat16, float16, float64 or "
                "float8_e4m3fn with scales"
            )


def _check_scales(name: str, weight: _Described, scale: _Described | None) -> None:
    if len(weight.shape) != 2:
        raise CheckpointError(f"{name} is FP8, which only a matrix can be; its shape is {list(weight.shape)}")
    if scale is None:
        raise CheckpointError(f"{name} is FP8 but its scales {name}{SCALE} are missing")
    if scale.shape != FP8_BLOCKS.scale_shape(weight.shape):
        raise CheckpointError(
            f"{name}{SCALE} has shape {list(scale.shape)}, not one scale for each 128×128 block of {list(weight.shape)}"
        )
    if scale.dtype not in _SCALES:
        raise CheckpointError(
            f"{name}{SCALE} is stored as {_name(scale.dtype)}; scales are float32, bfloat16, float16, float64 or "
            "float8_e8m0fnu"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Scheme(Structure):
    quant_method: str | None = None
    weight_block_size: list[int] | None = None
    fmt: str | None = None


class _Quantized(Structure):
    quantization_config: _Scheme


def check_quantization(config: dict[str, Any]) -> None:
    """The `quantization_config` of a config.json is none or FP8 in 128×128 blocks.

    Raises:
        CheckpointError: it is something else.
    """
    if config.get("quantization_config") in (None, {}):
        return
    found = checked(_Quantized, config, "config.json", CheckpointError).quantization_config
    if found.quant_method != "fp8" or found.weight_block_size != [BLOCK, BLOCK]:
        raise CheckpointError(
            f"quantization_config has quant_method {shorten(repr(found.quant_method))} with weight_block_size "
            f"{shorten(str(found.weight_block_size))}; only fp8 in [{BLOCK}, {BLOCK}] blocks is supported"
        )
    if found.fmt not in (None, "e4m3"):
        raise CheckpointError(f"quantization_config has fmt {shorten(repr(found.fmt))}; only e4m3 is supported")


def dequantized(source: Mapping[str, Lazy]) -> Iterator[Lazy]:
    """FP8 weights as BF16, without their scales; everything else as it is."""
    for name, lazy in source.items():
        if name.endswith(SCALE):
            continue
        if lazy.dtype == FP8:
            scale = source[name + SCALE]
            lazy = Lazy(name, torch.bfloat16, lazy.shape, functools.partial(_dequantize, lazy, scale))
        yield lazy


def _dequantize(weight: Lazy, scale: Lazy) -> Tensor:
    return ops.dequantize_blocks(weight.make(), scale.make(), torch.bfloat16)


def as_bf16(source: Mapping[str, Lazy]) -> Iterator[Lazy]:
    """Everything in BF16 but `e_score_correction_bias`, which BF16 would round."""
    for lazy in dequantized(source):
        yield _cast(lazy)


def as_fp8(source: Mapping[str, Lazy]) -> Iterator[Lazy]:
    """As published: linears of attention and experts in FP8 with their scales, the rest in BF16. FP8 passes through."""
    for name, lazy in source.items():
        if name.endswith(SCALE) or lazy.dtype == FP8:
            yield lazy
        elif is_quantized(name):
            yield from _quantize(lazy)
        else:
            yield _cast(lazy)


def _cast(lazy: Lazy) -> Lazy:
    if lazy.name.endswith("e_score_correction_bias"):
        return lazy
    return lazy._replace(dtype=torch.bfloat16, make=lambda: lazy.make().bfloat16())


def _quantize(lazy: Lazy) -> tuple[Lazy, Lazy]:
    """The weight and its scales, which wait (they are small) until the weight is written."""
    scales: list[Tensor] = []

    def weight() -> Tensor:
        q, scale = quantize_blocks(lazy.make())
        scales.append(scale)
        return q

    return (
        Lazy(lazy.name, FP8, lazy.shape, weight),
        Lazy(lazy.name + SCALE, torch.float32, FP8_BLOCKS.scale_shape(lazy.shape), scales.pop),
    )
