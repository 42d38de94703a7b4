"""What is not a product in a training step, in one pass each: RMSNorm, SwiGLU, the sum over a token's experts, AdamW.

Rounding is that of the torch references, so that a value between two roundings falls the same way.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel is given is typed by Triton)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.adamw import AdamW
from leanseek.ops.triton.numbers import narrow

PROGRAMS = 1024  # that share the rows where each sums up a column: eight on every multiprocessor of an H100


# ---- RMSNorm ----


class RMSNorm(torch.autograd.Function):
    """Keeps x and a number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        flat = x.reshape(-1, x.shape[-1])
        rows, columns = flat.shape
        out, inverse = torch.empty_like(flat), torch.empty(rows, dtype=torch.float32, device=x.device)
        _norm[(rows,)](flat, weight, out, inverse, flat.stride(0), columns, eps, triton.next_power_of_2(columns))
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1]).contiguous()
        rows, columns = flat.shape
        dx = torch.empty_like(grad)
        partial = torch.empty(min(PROGRAMS, rows), columns, dtype=torch.float32, device=x.device)
        _norm_backward[(partial.shape[0],)](
            flat, weight, grad, inverse, dx, partial, flat.stride(0), rows, columns, triton.next_power_of_2(columns)
        )
        return dx.view(x.shape), partial.sum(0).to(weight.dtype), None


@triton.jit
def _norm(x, weight, out, inverse, stride, D, eps, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + columns, mask=columns < D, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(v * v, 0) / D + eps)
    normed = narrow(v * r, out.dtype.element_ty).to(tl.float32)
    w = narrow(tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32), out.dtype.element_ty)
    tl.store(out + row * D + columns, narrow(normed * w.to(tl.float32), out.dtype.element_ty), mask=columns < D)
    tl.store(inverse + row, r)


@triton.jit
def _norm_backward(x, weight, grad, inverse, dx, partial, stride, M, D, BLOCK: tl.constexpr):
    """With n = x r: dx = r (w g - n mean(w g n)), dw = Σ g n."""
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        place = tl.cast(row, tl.int64)
        r = tl.load(inverse + row)
        n = tl.load(x + place * stride + columns, mask=columns < D, other=0.0).to(tl.float32) * r
        g = tl.load(grad + place * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        dw += g * n
        g *= w
        d = r * (g - n * (tl.sum(g * n, 0) / D))
        tl.store(dx + place * D + columns, narrow(d, dx.dtype.element_ty), mask=columns < D)
    tl.store(partial + tl.program_id(0) * D + columns, dw, mask=columns < D)


# ---- SwiGLU ----


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up of two tensors [..., I]."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]), None).view(gate.shape)

    @staticmethod
    def backward(ctx, grad):
        gate, up = (t.reshape(-1, t.shape[-1]) for t in ctx.saved_tensors)
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        swiglu_backward(grad.reshape(gate.shape).contiguous(), gate, up, None, dgate, dup, None)
        return dgate.view(grad.shape), dup.view(grad.shape)


def swiglu_forward(gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor:
    """weight · silu(gate) · up: gate and up [M, I], which may be halves of one tensor; weight [M]."""
    m, i = gate.shape
    out = torch.empty(m, i, dtype=gate.dtype, device=gate.device)
    if m:
        grid = (m, triton.cdiv(i, 1024))
        _swiglu[grid](gate, up, weight, None, out, None, None, None, gate.stride(0), up.stride(0), 0, 0, i, 1024)
    return out


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None, dgate: Tensor, dup: Tensor, act: Tensor | None
) -> Tensor | None:
    """grad [M, I] of the activation into dgate and dup; the activation again into act; weight's gradient [M]."""
    m, i = gate.shape
    partial = None if weight is None else torch.empty(triton.cdiv(i, 1024), m, device=gate.device)
    if m:
        grid = (m, triton.cdiv(i, 1024))
        _swiglu[grid](
            gate, up, weight, grad, act, dgate, dup, partial, gate.stride(0), up.stride(0), dgate.stride(0),
            dup.stride(0), i, 1024,
        )  # fmt: skip
    return None if partial is None else partial.sum(0)


@triton.jit
def _swiglu(
    gate, up, weight, grad, out, dgate, dup, partial, stride_g, stride_u, stride_dg, stride_du, I, BLOCK: tl.constexpr
):
    """What is None is not asked for: forward has no gradients, a feed-forward that every token takes no weights."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < I
    g = tl.load(gate + row * stride_g + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_u + columns, mask=inside, other=0.0).to(tl.float32)
    sig = 1.0 / (1.0 + tl.exp(-g))
    act, w = g * sig * u, 1.0
    if weight is not None:
        w = tl.load(weight + row).to(tl.float32)
    if out is not None:
        tl.store(out + row * I + columns, narrow(act * w, out.dtype.element_ty), mask=inside)
    if grad is not None:
        d = tl.load(grad + row * I + columns, mask=inside, other=0.0).to(tl.float32)
        if partial is not None:
            tl.store(partial + tl.program_id(1) * tl.num_programs(0) + row, tl.sum(d * act, 0))
        d *= w
        kind = dgate.dtype.element_ty
        tl.store(dgate + row * stride_dg + columns, narrow(d * u * (sig + g * sig * (1 - sig)), kind), mask=inside)
        tl.store(dup + row * stride_du + columns, narrow(d * g * sig, kind), mask=inside)


# ---- a token's experts ----


def combine(rows: Tensor, place: Tensor, tokens: int) -> Tensor:
    """Sum of rows [M, D] at `place` [tokens · K], K after each other: [tokens, D]."""
    d = rows.shape[1]
    out = torch.empty(tokens, d, dtype=rows.dtype, device=rows.device)
    if tokens:
        _combine[(tokens, triton.cdiv(d, 1024))](rows, place, out, d, place.numel() // tokens, 1024)
    return out


@triton.jit
def _combine(rows, place, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k)
        total += tl.load(rows + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + columns, narrow(total, out.dtype.element_ty), mask=columns < D)


# ---- AdamW ----


def adamw(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rule: AdamW) -> None:
    step += 1
    if weight.numel():
        _adamw[(triton.cdiv(weight.numel(), 2048),)](
            weight, grad, exp_avg, exp_avg_sq, step, *rule, weight.numel(), 2048, num_warps=8
        )


@triton.jit
def _adamw(weight, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, decay, N, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < N
    w = tl.load(weight + places, mask=inside, other=0.0)
    g = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + places, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + places, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(step)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    bias1, bias2 = 1 - tl.exp(count * tl.log(beta1)), 1 - tl.exp(count * tl.log(beta2))
    w = w * (1 - lr * decay) - lr / bias1 * m / (tl.sqrt_rn(v / bias2) + eps)
    tl.store(weight + places, w, mask=inside)
    tl.store(exp_avg + places, narrow(m, exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + places, narrow(v, exp_avg_sq.dtype.element_ty), mask=inside)
