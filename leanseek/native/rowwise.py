"""RMSNorm, SwiGLU and RoPE, forward and backward, in float32 and BF16; AdamW over BF16 moments; rows in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek import ops
from leanseek.native.library import DTYPES, Function, accepts, implements, kernel, pointers
from leanseek.ops.adamw import AdamW
from leanseek.ops.dispatch import Rows
from leanseek.ops.swiglu import weighted_swiglu, weighted_swiglu_backward
from leanseek.ops.weights import INT8_ROWS, QuantizedWeight

_rms_norm = kernel("rms_norm", "n pn p pp nn f")
_rms_norm_backward = kernel("rms_norm_backward", "n pn pp p pp nn")
_swiglu = kernel("swiglu", "n ppn p p nn")
_swiglu_backward = kernel("swiglu_backward", "n ppn pp pppp nn")
_adamw = kernel("adamw", "pppp n ffffff")
_rotate = kernel("rotate", "n pp pp n p p nn")
_quantize_rows = kernel("quantize_rows", "np nn pp")


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x [..., D], x as rows, and what each row was divided by."""
    rows = x.reshape(-1, x.shape[-1])
    out, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(rows.shape[0])
    _rms_norm(
        DTYPES[x.dtype], rows.data_ptr(), rows.stride(0), weight.data_ptr(), out.data_ptr(), rstd.data_ptr(),
        *rows.shape, eps,
    )  # fmt: skip
    return out, rows, rstd


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        wide = weight.float()
        out, rows, rstd = _normed(x, wide, eps)
        ctx.save_for_backward(rows, wide, rstd)
        ctx.weight_dtype = weight.dtype
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, wide, rstd = ctx.saved_tensors
        grad = grad.contiguous()
        dx, dweight = torch.empty(grad.shape, dtype=rows.dtype), torch.empty_like(wide)
        _rms_norm_backward(
            DTYPES[rows.dtype], rows.data_ptr(), rows.stride(0), wide.data_ptr(), rstd.data_ptr(), grad.data_ptr(),
            dx.data_ptr(), dweight.data_ptr(), *rows.shape,
        )  # fmt: skip
        return dx, dweight.to(ctx.weight_dtype), None


@implements(ops.rms_norm, accepts, Rows.BOTH)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return _normed(x, weight.float(), eps)[0]  # at a few rows, autograd's entry takes longer than the norm


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[no-untyped-def]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _gated(gate, up, None).view(gate.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _gated_backward(gate, up, None, grad.contiguous(), dgate, dup, None, None)
        return dgate, dup


def _gated(gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor:
    """weight · silu(gate) · up as rows, [.., I]: gate and up of one row stride, which may be halves of one tensor."""
    rows, out = gate.view(-1, gate.shape[-1]), torch.empty(gate.shape, dtype=gate.dtype)
    _swiglu(DTYPES[gate.dtype], gate.data_ptr(), up.data_ptr(), rows.stride(0), *pointers(weight, out), *rows.shape)
    return out


def _gated_backward(gate: Tensor, up: Tensor, weight: Tensor | None, *others: Tensor | None) -> None:
    """others: the gradient; then what is written: dgate, dup, the activation again, dweight."""
    rows = gate.view(-1, gate.shape[-1])
    _swiglu_backward(
        DTYPES[gate.dtype], gate.data_ptr(), up.data_ptr(), rows.stride(0), *pointers(weight, *others), *rows.shape
    )


def _alike(gate: Tensor, up: Tensor) -> bool:
    return accepts(gate, up) and gate.dtype == up.dtype and gate.shape == up.shape


@implements(ops.swiglu, _alike, Rows.BOTH)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate, up)


def _weighs(hidden: Tensor, weight: Tensor, grad: Tensor | None = None) -> bool:
    dense = all(t.is_contiguous() for t in (hidden, weight) + (() if grad is None else (grad,)))
    return accepts(hidden, weight, grad) and dense and weight.dtype == torch.float32


@implements(weighted_swiglu, _weighs)
def weighted(hidden: Tensor, weight: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return _gated(gate, up, weight)


@implements(weighted_swiglu_backward, _weighs)
def weighted_backward(hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    act, dhidden, dweight = torch.empty_like(grad), torch.empty_like(hidden), torch.empty_like(weight)
    gate, up = hidden.chunk(2, dim=-1)
    _gated_backward(gate, up, weight, grad, *dhidden.chunk(2, dim=-1), act, dweight)
    return act, dhidden, dweight


class _Rotate(Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleave):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        return _rotated(x, cos, sin, interleave, transpose=False)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, ctx.interleave, transpose=True), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool, transpose: bool) -> Tensor:
    """x [B, T, H, R] by its strides; cos, sin [B or 1, T, R / 2]."""
    cos, sin = cos.contiguous(), sin.contiguous()
    strides, sizes = torch.tensor(x.stride()), torch.tensor(x.shape)
    out = torch.empty(x.shape, dtype=x.dtype)
    angle_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    _rotate(
        DTYPES[x.dtype], x.data_ptr(), strides.data_ptr(), cos.data_ptr(), sin.data_ptr(), angle_batch, out.data_ptr(),
        sizes.data_ptr(), int(interleave), int(transpose),
    )  # fmt: skip
    return out


def _rotates(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> bool:
    """[B, T, H, R] with angles for each token (training), or [N, H, R] (serving)."""
    return accepts(x) and x.ndim in (3, 4) and cos.ndim == x.ndim - 1 and cos.shape[-2] == x.shape[-3]


@implements(ops.rotate, _rotates, Rows.BOTH)
def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    if x.ndim == 3:
        return _Rotate.apply(x[None], cos[None], sin[None], interleave)[0]
    return _Rotate.apply(x, cos, sin, interleave)


def _updates(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rule: AdamW) -> bool:
    moments = exp_avg.dtype == exp_avg_sq.dtype == torch.bfloat16
    tensors = (weight, grad, exp_avg, exp_avg_sq)
    return (
        accepts(*tensors)
        and moments
        and weight.dtype == grad.dtype == torch.float32
        and (all(t.is_contiguous() for t in tensors))
    )


@implements(ops.adamw, _updates)
def adamw(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rule: AdamW) -> None:
    step += 1
    rate, root = rule.lr / (1 - rule.beta1 ** step.item()), (1 - rule.beta2 ** step.item()) ** -0.5
    _adamw(
        weight.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), weight.numel(),
        rule.beta1, rule.beta2, rate, root, rule.eps, 1 - rule.lr * rule.weight_decay,
    )  # fmt: skip


@implements(ops.quantize_rows, lambda weight: accepts(weight) and weight.is_contiguous())
def quantize_rows(weight: Tensor) -> QuantizedWeight:
    codes, scale = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(len(weight))
    _quantize_rows(DTYPES[weight.dtype], weight.data_ptr(), *weight.shape, *pointers(codes, scale))
    return QuantizedWeight(codes, scale, INT8_ROWS)
