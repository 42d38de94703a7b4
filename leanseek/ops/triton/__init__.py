"""Kernels for GPUs in Triton, and for SM90 in Gluon. Imported where they are used: triton reads its settings, and takes
a second, then.

numbers.py  a tile's scale, rounding         quantize.py     1×128 tiles and their transposes, weight blocks
tiles.py    rows of experts, cut in 128      swiglu.py       SwiGLU with quantisation, forward and backward
gemm.py     block-scaled products            paths.py        Triton, ours for SM90, cuBLASLt or DeepGEMM; which one ran
hopper.py   the same for SM90, in Gluon      elementwise.py  norms, SwiGLU, a token's experts, the head's softmax, AdamW
attention.py  around cuDNN's attention       training.py     what a training step asks for, as ops
invariant.py  row-invariant products, experts and attention      serving.py   what a served step asks for, as ops
"""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def refusal(device: torch.device) -> str:
    """Empty where these kernels run, else the reason."""
    if device.type != "cuda":
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "E4M3 needs compute capability 8.9 or more"
    return ""


def complaint(error: Exception) -> str:
    """The reason why a trial failed, in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


from leanseek.ops.triton import serving, training  # noqa: E402, F401  (they register; refusal is read when an op is picked)
