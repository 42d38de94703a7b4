"""Picks the kernel for a block-scaled product on this GPU: DeepGEMM, cuBLASLt through torch, our SM90 one, or Triton.

The first three are used only after a small trial product, run once, has agreed with Triton's. A missing package, an
old cuBLASLt or a changed interface shows up as a reason in `status`. `ran` counts which kernel computed what.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.gpu import gemm
from leanseek.gpu.device import complaint
from leanseek.gpu.quantize import quantize_blocks, quantize_both, quantize_tiles
from leanseek.ops.formats import TILE
from leanseek.ops.grouped import Tiles, group_tiles
from leanseek.ops.operands import FP8, Codes

_RAN: Counter[tuple[str, str]] = Counter()


def product(a: Codes, b: Codes, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a · bᵀ, like `gemm.product`, on the fastest path that takes these operands."""
    op = "product" if _in_blocks(b) else "weight gradient"
    if _deepgemm_takes(a, b, dtype) and not _refusal("deepgemm", op, dtype, a.codes.device):
        return _counted(op, "deepgemm", _deepgemm(a, b))
    if _cublaslt_takes(a, b) and not _refusal("cublaslt", op, dtype, a.codes.device):
        return _counted(op, "cublaslt", _cublaslt(a, b, dtype))
    if _hopper_takes(a, b, op, dtype):
        return _counted(op, "hopper", _hopper().product(a, b, dtype))
    return _counted(op, "triton", gemm.product(a, b, dtype))


def grouped_product(a: Codes, b: Codes, tiles: Tiles, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Each expert's rows of a times its bᵀ, like `gemm.grouped_product`, on the fastest path that takes them."""
    op = "grouped product"
    if _deepgemm_takes(a, b, dtype) and not _refusal("deepgemm", op, dtype, a.codes.device):
        return _counted(op, "deepgemm", _deepgemm_grouped(a, b, tiles))
    if _hopper_takes(a, b, op, dtype):
        return _counted(op, "hopper", _hopper().grouped_product(a, b, tiles, dtype))
    return _counted(op, "triton", gemm.grouped_product(a, b, tiles, dtype))


def grouped_weight_gradient(a: Codes, b: Codes, tiles: Tiles, dtype: torch.dtype = torch.float32) -> Tensor:
    """a_e · b_eᵀ over each expert's own tiles, like `gemm.grouped_weight_gradient`."""
    op = "grouped weight gradient"
    if _hopper_takes(a, b, op, dtype):
        return _counted(op, "hopper", _hopper().grouped_weight_gradient(a, b, tiles, dtype))
    return _counted(op, "triton", gemm.grouped_weight_gradient(a, b, tiles, dtype))


def ran() -> dict[str, dict[str, int]]:
    """How many products each path has computed in this process so far: by op, then by path."""
    found: dict[str, dict[str, int]] = {}
    for (op, path), count in sorted(_RAN.items()):
        found.setdefault(op, {})[path] = count
    return found


def status(device: torch.device) -> dict[str, str]:
    """For each path and each op it supports: "runs", or why it does not run here."""
    asked = [
        ("deepgemm", "product", torch.bfloat16),
        ("deepgemm", "grouped product", torch.bfloat16),
        ("cublaslt", "product", torch.bfloat16),
        ("cublaslt", "weight gradient", torch.float32),
        ("hopper", "product", torch.bfloat16),
        ("hopper", "grouped product", torch.bfloat16),
        ("hopper", "grouped weight gradient", torch.float32),
    ]
    return {f"{path}: {op}": _refusal(path, op, dtype, device) or "runs" for path, op, dtype in asked}


def _counted(op: str, path: str, out: Tensor) -> Tensor:
    _RAN[op, path] += 1
    return out


def _in_blocks(b: Codes) -> bool:
    return b.scales.shape[-2] != b.codes.shape[-2]


@functools.cache
def _refusal(path: str, op: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why `path` cannot compute `op` on this device; empty if it does and agrees with Triton."""
    if device.type != "cuda":
        return "no CUDA device"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "block-scaled products of this library need SM90 (H100, H200)"
    try:
        ours, theirs = _trial(path, op, dtype, device)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever the library raises is the reason
        return complaint(error)
    worst = ((ours - theirs).abs().max() / ours.abs().max()).item()
    return "" if worst < 0.01 else f"differs from Triton's by {worst:.1%}"


def _trial(path: str, op: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same small product, by Triton and by `path`."""
    draw = functools.partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    tiles = group_tiles(torch.tensor([100, 256], dtype=torch.int32, device=device), 256)
    a, rows = quantize_tiles(draw(256, 512)), quantize_tiles(draw(384, 512))
    if op == "grouped weight gradient":
        a, b = (quantize_both(draw(256, n), tiles=tiles)[1] for n in (384, 256))
        by_triton = gemm.grouped_weight_gradient(a, b, tiles, dtype)
        return by_triton, _hopper().grouped_weight_gradient(a, b, tiles, dtype)
    if op == "grouped product":
        b = quantize_blocks(draw(2, 384, 512))
        other = _deepgemm_grouped if path == "deepgemm" else _hopper().grouped_product
        return gemm.grouped_product(a, b, tiles, dtype), other(a, b, tiles)
    b = quantize_blocks(draw(384, 512)) if op == "product" else rows
    others = {
        "deepgemm": lambda: _deepgemm(a, b),
        "cublaslt": lambda: _cublaslt(a, b, dtype),
        "hopper": lambda: _hopper().product(a, b, dtype),
    }
    return gemm.product(a, b, dtype), others[path]()


# ---- our own for SM90 ----


def _hopper_takes(a: Codes, b: Codes, op: str, dtype: torch.dtype) -> bool:
    return not _refusal("hopper", op, dtype, a.codes.device) and _hopper().takes(a, b)


def _hopper() -> Any:
    """Imports the Gluon kernels at first use: Gluon came with Triton 3.4 and its interface still changes."""
    from leanseek.gpu import hopper

    return hopper


# ---- cuBLASLt ----


def _cublaslt_takes(a: Codes, b: Codes) -> bool:
    """Row scales need stride [1, rows] exactly, so the number of rows must be a multiple of 4. K must be a multiple of
    128; b's rows a multiple of 128, or of 16 if each row has a scale. Block scales need `quantize_blocks`' layout."""
    (m, k), n = a.codes.shape, b.codes.shape[0]
    fits = not _in_blocks(b) or (b.scales.stride(1) == 1 and b.scales.stride(0) == -(-b.scales.shape[1] // 4) * 4)
    return (
        fits and m % 4 == 0 and n % (TILE if _in_blocks(b) else 16) == 0 and k % TILE == 0 and hasattr(F, "scaled_mm")
    )


def _cublaslt(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    scaling = F.ScalingType
    if _in_blocks(b):  # [K blocks rounded up to a multiple of 4, N blocks], K blocks contiguous
        n, stride = b.scales.shape[0], b.scales.stride(0)
        scale_b, recipe_b = b.scales.as_strided((stride, n), (1, stride)), scaling.BlockWise128x128
    else:
        scale_b, recipe_b = b.scales, scaling.BlockWise1x128
    return F.scaled_mm(
        a.codes, b.codes.t(), a.scales, scaling.BlockWise1x128, scale_b, recipe_b, output_dtype=dtype,
        use_fast_accum=False,
    )  # fmt: skip


# ---- DeepGEMM ----


def _deepgemm_takes(a: Codes, b: Codes, dtype: torch.dtype) -> bool:
    return _in_blocks(b) and dtype == torch.bfloat16 and a.codes.shape[1] % TILE == 0 and b.codes.shape[-2] % 64 == 0


def _library() -> Any:
    import deep_gemm

    return deep_gemm


def _deepgemm(a: Codes, b: Codes) -> Tensor:
    out = torch.empty(a.codes.shape[0], b.codes.shape[0], dtype=torch.bfloat16, device=a.codes.device)
    _library().fp8_gemm_nt((a.codes, a.scales), (b.codes, b.scales.contiguous()), out)
    return out


def _deepgemm_grouped(a: Codes, b: Codes, tiles: Tiles) -> Tensor:
    """DeepGEMM wants each expert's rows to start at a multiple of 128. We move the FP8 rows there and the BF16 results
    back, without waiting for the counts."""
    m, device = a.codes.shape[0], a.codes.device
    place = torch.arange(TILE, device=device)
    rows = tiles.start[:, None] + place  # [T, 128]: the row that goes to each place, if any
    held = rows < tiles.stop[:, None]
    rows = torch.where(held, rows, 0).flatten()
    codes = a.codes.view(torch.uint8).index_select(0, rows).view(FP8)
    scales = a.scales.t().index_select(1, rows).t()
    expert = torch.where(held[:, :1], tiles.expert[:, None], -1).int().expand(-1, TILE).flatten().contiguous()
    padded = torch.empty(rows.numel(), b.codes.shape[1], dtype=torch.bfloat16, device=device)
    _library().m_grouped_fp8_gemm_nt_contiguous((codes, scales), (b.codes, b.scales.contiguous()), padded, expert)
    back = torch.zeros(m + 1, dtype=torch.int64, device=device)
    back[torch.where(held.flatten(), rows, m)] = torch.arange(
        rows.numel(), device=device
    )  # entry m collects the unused places
    return padded.index_select(0, back[:m])
