"""Which device and dtype to compute with here, and on how many threads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from leanseek.errors import InputError
from leanseek.machine.threads import cpus

NARROW = (torch.bfloat16, torch.float16)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def preferred_dtype(device: torch.device | str) -> torch.dtype:
    """BF16 where the hardware multiplies it (CUDA, AVX512_BF16, AMX) and oneDNN may; else float32: BF16 is emulated."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native and multiplies(torch.bfloat16) else torch.float32


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype`. Found out once, with a small product: ONEDNN_MAX_CPU_ISA may disable what
    cpuid reports."""
    if dtype not in NARROW:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        onednn_linear(torch.ones(2, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))
    except RuntimeError:  # could not create a primitive descriptor
        return False
    return True


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] · weight [out, in]ᵀ by oneDNN; torch's own linear uses it for some sizes only."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def use_threads(count: int | None) -> None:
    """Run torch and the native kernels, which share its pool, on `count` CPU threads; None changes nothing.

    OpenMP keeps this number per thread; a thread started later picks it up at its first native kernel.

    Raises:
        InputError: `count` is below one or above four per CPU that this process may use.
    """
    if count is None:
        return
    most = 4 * cpus()
    if not 1 <= count <= most:
        raise InputError(f"threads must lie between 1 and {most}, four a CPU that may be used here; {count} does not")
    torch.set_num_threads(count)
