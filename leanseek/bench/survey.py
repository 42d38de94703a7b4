"""Which path each op takes on this machine, by dtype and rows, and why not a faster one (for `leanseek doctor`).

Nothing is computed: the table that picks is asked with small tensors like those that a model hands over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanseek import native
from leanseek.gpu.device import refusal
from leanseek.machine.device import multiplies
from leanseek.ops.dispatch import OPS
from leanseek.ops.experts import Dispatched
from leanseek.ops.operands import FP8, Kept
from leanseek.ops.weights import FP8_BLOCKS, QuantizedWeight, StoredWeight

ROWS = (1, 256)  # one token, and many
KINDS = ("float32", "bfloat16", "fp8 weights")  # of the operands; FP8 weights meet BF16 activations
PRODUCTS = {  # ops that torch computes as matrix products
    "linear", "head_linear", "expert_products", "latent_attention", "causal_attention", "mla_attention",
    "linear_cross_entropy", "grouped_product", "grouped_gradient",
}  # fmt: skip
Operands = tuple[Any, ...]


class Path(NamedTuple):
    """What an op runs on for one kind of operands."""

    op: str
    use: str  # "training", "loading" or "serving", which is within `row_invariant`
    kind: str
    backends: tuple[str, ...]  # for each number in ROWS: "native", "gpu" or "torch"
    declined: bool  # there is a faster one, which does not take these operands
    widened: bool  # torch multiplies in float32, since this CPU has no product of the operands' dtype


@torch.no_grad()
def survey(device: torch.device) -> list[Path]:
    """Every op, in each use that is made of it and the kinds of operands that it takes."""
    usable = {"gpu"} if not refusal(device) else {"native"} if device.type == "cpu" else set()
    found = []
    for use, ops in (("training", TRAINING), ("loading", LOADING), ("serving", SERVING)):
        serving = use == "serving"
        for op, operands in ops.items():
            for kind in KINDS:
                asked = [a for rows in ROWS if (a := operands(_Draw(device, kind, rows))) is not None]
                if not asked:
                    continue
                backends = tuple(OPS[op].backend(serving, *a) for a in asked)
                torch_runs = "torch" in backends
                declined = torch_runs and bool(set(OPS[op].backends(serving)) & usable)
                narrow = device.type == "cpu" and kind != "float32" and not multiplies(torch.bfloat16)
                found.append(Path(op, use, kind, backends, declined, torch_runs and narrow and op in PRODUCTS))
    return found


def reasons(device: torch.device) -> dict[str, str]:
    """Why no faster path: which kernels do not run here, and which products are emulated."""
    found = {}
    if device.type == "cpu":
        if native.status().variant is None:
            found["native kernels"] = native.status().detail
        if not multiplies(torch.bfloat16):
            found["bfloat16 products"] = "oneDNN has none for this CPU: torch multiplies in float32 and rounds once"
    if why := refusal(device):
        found["GPU kernels"] = why
    else:
        from leanseek.gpu import paths  # imports triton

        found |= {f"FP8 by {what}": said for what, said in paths.status(device).items() if said != "runs"}
    return found


class _Draw:
    """Tensors of one kind of call."""

    def __init__(self, device: torch.device, kind: str, rows: int):
        self.device, self.rows, self.fp8 = device, rows, kind == "fp8 weights"
        self.dtype = torch.float32 if kind == "float32" else torch.bfloat16

    def x(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Activations: `rows` rows of `shape`."""
        return torch.empty(self.rows, *shape, dtype=dtype or self.dtype, device=self.device)

    def w(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def stored(self, *shape: int) -> StoredWeight:
        """A weight that may be FP8."""
        if not self.fp8:
            return self.w(*shape)
        scales = torch.empty(FP8_BLOCKS.scale_shape(shape), device=self.device)
        return QuantizedWeight(self.w(*shape, dtype=FP8_BLOCKS.dtype), scales, FP8_BLOCKS)


D, H, E = 128, 4, 4  # widths, heads, experts
Example = Callable[[_Draw], Operands | None]  # None: not of this kind


def _plain(operands: Callable[[_Draw], Operands]) -> Example:
    """An op without weights, or with weights that are never FP8."""
    return lambda t: None if t.fp8 else operands(t)


def _float32(operands: Callable[[_Draw], Operands]) -> Example:
    return lambda t: operands(t) if t.dtype == torch.float32 else None


def _experts(t: _Draw) -> Operands:
    sent = Dispatched(t.x(D), torch.empty(E, dtype=torch.int32, device=t.device), t.x(dtype=torch.float32))
    return sent, t.stored(E, 2 * D, D), t.stored(E, D, D)


_SHARED: dict[str, Example] = {
    "linear": lambda t: (t.x(D), t.stored(D, D)),
    "rms_norm": _plain(lambda t: (t.x(D), t.w(D), 1e-6)),
    "swiglu": _plain(lambda t: (t.x(D), t.x(D))),
    "combine_rows": _plain(lambda t: (t.x(D),)),
    "rotate": _plain(lambda t: (t.x(H, 64), t.x(32, dtype=torch.float32), t.x(32, dtype=torch.float32), True)),
    "expert_scores": _float32(lambda t: (t.x(E),)),
    "select_experts": _float32(lambda t: (t.x(E), t.w(E))),
}
TRAINING: dict[str, Example] = _SHARED | {
    "mla_attention": _plain(
        lambda t: (
            t.x(H, 192)[None],
            t.x(H, 256)[None],
            t.x(64)[None],
            t.x(32, dtype=torch.float32)[None],
            t.x(32, dtype=torch.float32)[None],
            1.0,
            True,
        )
    ),
    "causal_attention": _plain(lambda t: (t.x(H, D)[None], t.x(H, D)[None], t.x(H, D)[None], 1.0)),
    "weighted_swiglu": _plain(lambda t: (t.x(2 * D), t.x(dtype=torch.float32))),
    "weighted_swiglu_backward": _plain(lambda t: (t.x(2 * D), t.x(dtype=torch.float32), t.x(D))),
    "linear_cross_entropy": _plain(lambda t: (t.x(D), t.w(D, D))),
    "softmax_cross_entropy": _plain(lambda t: (t.x(D),)),
    "grouped_product": _plain(lambda t: (t.x(D), t.w(E, D, D), None, t.dtype)),
    "grouped_gradient": _plain(lambda t: (t.x(D), t.x(D), None, t.dtype)),
    "adamw": _float32(lambda t: (t.x(D), t.x(D), *(t.x(D, dtype=torch.bfloat16) for _ in range(2)), None, None)),
    "fp8_rows": _plain(lambda t: (t.x(D), True)),
    "fp8_wide": _plain(lambda t: (Kept(t.x(D, dtype=FP8), t.x(1, dtype=torch.float32)), t.dtype)),
    "fp8_turn": _plain(lambda t: (t.x(D),)),
    "fp8_both": _plain(lambda t: (t.x(D),)),
    "fp8_both_blocks": _plain(lambda t: (t.x(D),)),
    "fp8_blocks": _plain(lambda t: (t.w(D, D), True, t.dtype)),
    "fp8_stored_blocks": _plain(lambda t: (t.w(D, D),)),
    "fp8_swiglu": _plain(lambda t: (t.x(2 * D),)),
    "fp8_swiglu_backward": _plain(lambda t: (t.x(D),)),
    "fp8_e5m6": _plain(lambda t: (t.x(D),)),
}
LOADING: dict[str, Example] = {
    "quantize_rows": _plain(lambda t: (t.w(D, D),)),
}
SERVING: dict[str, Example] = {
    "latent_attention": _plain(lambda t: (t.x(H, D), t.w(D, D))),
    "head_linear": _plain(lambda t: (t.x(H, D), t.w(H, D, D))),
    "expert_products": _experts,
    **_SHARED,
    "sample": _float32(lambda t: (t.x(D),)),
    "finite_rows": _float32(lambda t: (t.x(D),)),
}
