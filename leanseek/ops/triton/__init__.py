"""FP8 kernels for GPUs in Triton. Imported where they are used: triton reads its settings, and takes a second, then.

numbers.py  a tile's scale, rounding         quantize.py  1×128 tiles and their transposes, weight blocks
tiles.py    rows of experts, cut in 128      swiglu.py    SwiGLU with quantisation, forward and backward
gemm.py     block-scaled products            paths.py     Triton, cuBLASLt or DeepGEMM, and which one ran
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from leanseek.ops.dispatch import register


def refusal(device: torch.device) -> str:
    """Empty where these kernels run, else the reason."""
    if device.type != "cuda":
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "E4M3 needs compute capability 8.9 or more"
    return ""


@register("fp8_stored_blocks", "triton", lambda weight: not refusal(weight.device))
def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    from leanseek.ops.triton.quantize import quantize_blocks

    codes, scales, _ = quantize_blocks(weight)
    return codes, scales
