"""Which kernel a block-scaled product takes on this GPU: DeepGEMM, cuBLASLt through torch, or Triton's own.

A library takes part only after a small product of it, run here once, agreed with Triton's: an absent package, an old
cuBLASLt or a changed interface shows as a reason in `status`. `ran` counts which one computed what.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.triton import gemm
from leanseek.ops.triton.numbers import TILE
from leanseek.ops.triton.quantize import FP8, Codes, quantize_blocks, quantize_tiles
from leanseek.ops.triton.tiles import Tiles, group_tiles

_RAN: Counter[tuple[str, str]] = Counter()


def product(a: Codes, b: Codes, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a · bᵀ, as `gemm.product`, by the fastest path that takes these operands."""
    op = "product" if _in_blocks(b) else "weight gradient"
    if _deepgemm_takes(a, b, dtype) and not _refusal("deepgemm", op, dtype, a.codes.device):
        return _counted(op, "deepgemm", _deepgemm(a, b))
    if _cublaslt_takes(a, b) and not _refusal("cublaslt", op, dtype, a.codes.device):
        return _counted(op, "cublaslt", _cublaslt(a, b, dtype))
    return _counted(op, "triton", gemm.product(a, b, dtype))


def grouped_product(a: Codes, b: Codes, tiles: Tiles, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Each expert's rows of a times its bᵀ, as `gemm.grouped_product`, by the fastest path that takes them."""
    op = "grouped product"
    if _deepgemm_takes(a, b, dtype) and not _refusal("deepgemm", op, dtype, a.codes.device):
        return _counted(op, "deepgemm", _deepgemm_grouped(a, b, tiles))
    return _counted(op, "triton", gemm.grouped_product(a, b, tiles, dtype))


def grouped_weight_gradient(a: Codes, b: Codes, tiles: Tiles, dtype: torch.dtype = torch.float32) -> Tensor:
    return _counted("grouped weight gradient", "triton", gemm.grouped_weight_gradient(a, b, tiles, dtype))


def ran() -> dict[str, dict[str, int]]:
    """Products computed in this process so far: by op, then by path."""
    found: dict[str, dict[str, int]] = {}
    for (op, path), count in sorted(_RAN.items()):
        found.setdefault(op, {})[path] = count
    return found


def status(device: torch.device) -> dict[str, str]:
    """For each library and op that it could compute here: "runs", or why it does not."""
    asked = [
        ("deepgemm", "product", torch.bfloat16),
        ("deepgemm", "grouped product", torch.bfloat16),
        ("cublaslt", "product", torch.bfloat16),
        ("cublaslt", "weight gradient", torch.float32),
    ]
    return {f"{path}: {op}": _refusal(path, op, dtype, device) or "runs" for path, op, dtype in asked}


def _counted(op: str, path: str, out: Tensor) -> Tensor:
    _RAN[op, path] += 1
    return out


def _in_blocks(b: Codes) -> bool:
    return b.scales.shape[-2] != b.codes.shape[-2]


@functools.cache
def _refusal(path: str, op: str, dtype: torch.dtype, device: torch.device) -> str:
    """Empty where `path` computes `op` on this device as Triton does, else the reason."""
    if device.type != "cuda":
        return "no CUDA device"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "block-scaled products of this library need SM90 (H100, H200)"
    try:
        ours, theirs = _trial(path, op, dtype, device)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever a library raises is the answer to the question
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    worst = ((ours - theirs).abs().max() / ours.abs().max()).item()
    return "" if worst < 0.01 else f"differs from Triton's by {worst:.1%}"


def _trial(path: str, op: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same small product by Triton and by the library."""
    draw = functools.partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    a = quantize_tiles(draw(256, 512))
    if op == "grouped product":
        b = Codes(*quantize_blocks(draw(2, 384, 512))[:2])
        tiles = group_tiles(torch.tensor([100, 256], dtype=torch.int32, device=device), 256)
        return gemm.grouped_product(a, b, tiles, dtype), _deepgemm_grouped(a, b, tiles)
    b = Codes(*quantize_blocks(draw(384, 512))[:2]) if op == "product" else quantize_tiles(draw(384, 512))
    return gemm.product(a, b, dtype), _deepgemm(a, b) if path == "deepgemm" else _cublaslt(a, b, dtype)


# ---- cuBLASLt ----


def _cublaslt_takes(a: Codes, b: Codes) -> bool:
    """Scales of rows lie with stride [1, rows] exactly, so rows come in fours; operands in 16 bytes."""
    (m, k), n = a.codes.shape, b.codes.shape[0]
    return m % 4 == 0 and n % 16 == 0 and k % 16 == 0 and hasattr(F, "scaled_mm")


def _cublaslt(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    scaling = F.ScalingType
    if _in_blocks(b):  # [blocks of K up to a multiple of 4, blocks of N], the first with stride 1
        scale_b, recipe_b = F.pad(b.scales, (0, -b.scales.shape[1] % 4)).contiguous().t(), scaling.BlockWise128x128
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
    """DeepGEMM wants every expert's rows to start at a multiple of 128: they are moved there and back, in FP8 and BF16,
    without waiting for the counts."""
    m, device = a.codes.shape[0], a.codes.device
    place = torch.arange(TILE, device=device)
    rows = tiles.start[:, None] + place  # [T, 128]: the row that each place takes, if any
    held = rows < tiles.stop[:, None]
    rows = torch.where(held, rows, 0).flatten()
    codes = a.codes.view(torch.uint8).index_select(0, rows).view(FP8)
    scales = a.scales.t().index_select(1, rows).t()
    expert = torch.where(held[:, :1], tiles.expert[:, None], -1).int().expand(-1, TILE).flatten().contiguous()
    padded = torch.empty(rows.numel(), b.codes.shape[1], dtype=torch.bfloat16, device=device)
    _library().m_grouped_fp8_gemm_nt_contiguous((codes, scales), (b.codes, b.scales.contiguous()), padded, expert)
    back = torch.zeros(m + 1, dtype=torch.int64, device=device)
    back[torch.where(held.flatten(), rows, m)] = torch.arange(rows.numel(), device=device)  # the last for the unused
    return padded.index_select(0, back[:m])
