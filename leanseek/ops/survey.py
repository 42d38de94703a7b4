"""Which path each op takes on this machine, by dtype and rows, and why not a faster one (for `leanseek doctor`).

Nothing is computed: the table that picks is asked with small tensors like those that a model hands over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.ops import cpu, dispatch, triton
from leanseek.ops.products import multiplies

ROWS = (1, 256)  # one token, and many
FP8 = torch.float8_e4m3fn
KINDS = ("float32", "bfloat16", "fp8 weights")  # of the operands; FP8 weights meet BF16 activations
PRODUCTS = {  # ops that torch computes as matrix products
    "linear", "head_linear", "experts", "latent_attention", "causal_attention", "mla_attention", "linear_cross_entropy",
    "grouped_product", "grouped_gradient",
}  # fmt: skip
Operands = tuple[Tensor | None, ...]


class Path(NamedTuple):
    """What an op runs on for one kind of operands."""

    op: str
    use: str  # "training", "loading" or "serving", which is within `row_invariant`
    kind: str
    backends: tuple[str, ...]  # for each number in ROWS: "cpu", "triton" or "torch"
    declined: bool  # there is a faster one, which does not take these operands
    widened: bool  # torch multiplies in float32, since this CPU has no product of the operands' dtype


@torch.no_grad()
def survey(device: torch.device) -> list[Path]:
    """Every op, in each use that is made of it and the kinds of operands that it takes."""
    usable = {"triton"} if not triton.refusal(device) else {"cpu"} if device.type == "cpu" else set()
    found = []
    for use, ops in (("training", TRAINING), ("loading", LOADING), ("serving", SERVING)):
        serving = use == "serving"
        for op, operands in ops.items():
            for kind in KINDS:
                asked = [a for rows in ROWS if (a := operands(_Draw(device, kind, rows))) is not None]
                if not asked:
                    continue
                backends = tuple(dispatch.backend(op, serving, *a) for a in asked)
                torch_runs = "torch" in backends
                declined = torch_runs and bool(set(dispatch.table(serving).get(op, ())) & usable)
                narrow = device.type == "cpu" and kind != "float32" and not multiplies(torch.bfloat16)
                found.append(Path(op, use, kind, backends, declined, torch_runs and narrow and op in PRODUCTS))
    return found


def reasons(device: torch.device) -> dict[str, str]:
    """Why no faster path: which kernels do not run here, and which products are emulated."""
    found = {}
    if device.type == "cpu":
        if cpu.status().variant is None:
            found["native kernels"] = cpu.status().detail
        if not multiplies(torch.bfloat16):
            found["bfloat16 products"] = "oneDNN has none for this CPU: torch multiplies in float32 and rounds once"
    if refusal := triton.refusal(device):
        found["GPU kernels"] = refusal
    else:
        from leanseek.ops.triton import paths  # imports triton

        found |= {f"FP8 by {what}": why for what, why in paths.status(device).items() if why != "runs"}
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
        dtype = dtype or (FP8 if self.fp8 else self.dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def scales(self, *shape: int) -> Tensor | None:
        return torch.empty(shape, device=self.device) if self.fp8 else None


D, H, E = 128, 4, 4  # widths, heads, experts
Example = Callable[[_Draw], Operands | None]  # None: not of this kind


def _plain(operands: Callable[[_Draw], Operands]) -> Example:
    """An op without weights, or with weights that are never FP8."""
    return lambda t: None if t.fp8 else operands(t)


def _float32(operands: Callable[[_Draw], Operands]) -> Example:
    return lambda t: operands(t) if t.dtype == torch.float32 else None


def _experts(t: _Draw) -> Operands:
    scales = (torch.empty(E, 2, 1), torch.empty(E, 1, 1)) if t.fp8 else ()
    return (t.x(D), t.w(E, 2 * D, D), *scales)


_SHARED: dict[str, Example] = {
    "linear": lambda t: (t.x(D), t.w(D, D), t.scales(1, 1)),
    "experts": _experts,
    "rms_norm": _plain(lambda t: (t.x(D), t.w(D))),
    "swiglu": _plain(lambda t: (t.x(D), t.x(D))),
    "rotate": _plain(lambda t: (t.x(H, 64), t.x(32, dtype=torch.float32), t.x(32, dtype=torch.float32))),
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
        )
    ),
    "causal_attention": _plain(lambda t: (t.x(H, D)[None], t.x(H, D)[None], t.x(H, D)[None])),
    "weighted_swiglu": _plain(lambda t: (t.x(2 * D), t.x())),
    "weighted_swiglu_backward": _plain(lambda t: (t.x(2 * D), t.x(), t.x(D))),
    "combine_rows": _plain(lambda t: (t.x(D),)),
    "linear_cross_entropy": _plain(lambda t: (t.x(D), t.w(D, D))),
    "softmax_cross_entropy": _plain(lambda t: (t.x(D),)),
    "grouped_product": _plain(lambda t: (t.x(D), t.w(E, D, D), t.x(D))),
    "grouped_gradient": _plain(lambda t: (t.x(D), t.x(D), t.w(E, D, D))),
    "adamw": _float32(lambda t: (t.x(D), t.x(D), t.x(D, dtype=torch.bfloat16), t.x(D, dtype=torch.bfloat16))),
    "fp8_rows": _plain(lambda t: (t.x(D), None)),
    "fp8_turn": _plain(lambda t: (t.x(D),)),
    "fp8_both": _plain(lambda t: (t.x(D),)),
    "fp8_blocks": _plain(lambda t: (t.w(D, D), None)),
    "fp8_stored_blocks": _plain(lambda t: (t.w(D, D),)),
    "fp8_swiglu": _plain(lambda t: (t.x(2 * D),)),
    "fp8_swiglu_backward": _plain(lambda t: (t.x(D),)),
    "fp8_e5m6": _plain(lambda t: (t.x(D),)),
}
LOADING: dict[str, Example] = {
    "pack_panels": lambda t: (t.w(D, D),),
    "quantize_rows": _plain(lambda t: (t.w(D, D),)),
}
SERVING: dict[str, Example] = {
    "stack_step": _plain(lambda t: (t.w(D, D), t.w(2, D, D))),
    "packed_linear": lambda t: (t.x(D), t.w(1, 2, 64, 64, 2)),
    "packed_experts": lambda t: (t.x(D), t.w(E, 4, 64, 64, 2)),
    "latent_attention": _plain(lambda t: (t.x(H, D), t.w(D, D))),
    "head_linear": _plain(lambda t: (t.x(H, D), t.w(H, D, D))),
    **_SHARED,
    "sample": _float32(lambda t: (t.x(D),)),
    "finite_rows": _float32(lambda t: (t.x(D),)),
}
