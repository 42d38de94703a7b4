"""The parts of a training step that are not matrix products, one pass each: RMSNorm, SwiGLU, the sum over a token's
experts, the head's softmax, AdamW.

Values are rounded where the torch references round them, so that ties fall the same way.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton types a kernel's arguments)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.gpu.numbers import narrow
from leanseek.ops.adamw import AdamW

PROGRAMS = 1056  # programs that share the rows when each sums columns: eight per multiprocessor of an H100
VALUES = 4096  # values of narrow rows that a program holds at a time


# ---- RMSNorm ----


class RMSNorm(torch.autograd.Function):
    """Saves x and one number per row for backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, inverse = norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1]).contiguous()
        rows, columns = flat.shape
        dx, tile = torch.empty_like(grad), _tile(columns)
        programs = min(PROGRAMS, triton.cdiv(rows, tile[0]))
        partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
        _norm_backward[(programs,)](
            flat, weight, grad, inverse, dx, partial, flat.stride(0), rows, columns, *tile, num_warps=_warps(tile)
        )
        return dx.view(x.shape), partial.sum(0).to(weight.dtype), None


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x [..., D], and each row's 1 / root mean square in float32."""
    flat = x.reshape(-1, x.shape[-1])
    rows, columns = flat.shape
    out, inverse = torch.empty_like(flat), torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = _tile(columns)
    _norm[(triton.cdiv(rows, tile[0]),)](
        flat, weight, out, inverse, flat.stride(0), rows, columns, eps, *tile, num_warps=_warps(tile)
    )
    return out.view(x.shape), inverse


def _tile(columns: int) -> tuple[int, int]:
    """Rows and columns that a program holds at a time."""
    block = triton.next_power_of_2(columns)
    return max(1, VALUES // block), block


def _warps(tile: tuple[int, int]) -> int:
    return max(2, tile[0] * tile[1] // 2048)


@triton.jit
def _norm(x, weight, out, inverse, stride, M, D, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside, wide = (rows < M)[:, None] & (columns < D)[None, :], rows[:, None].to(tl.int64)
    v = tl.load(x + wide * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(v * v, 1) / D + eps)
    normed = narrow(v * r[:, None], out.dtype.element_ty).to(tl.float32)
    w = narrow(tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32), out.dtype.element_ty)
    result = narrow(normed * w.to(tl.float32)[None, :], out.dtype.element_ty)
    tl.store(out + wide * D + columns[None, :], result, mask=inside)
    tl.store(inverse + rows, r, mask=rows < M)


@triton.jit
def _norm_backward(
    x, weight, grad, inverse, dx, partial, stride, M, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """With n = x r: dx = r (w g - n mean(w g n)), dw = Σ g n."""
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        inside, wide = (rows < M)[:, None] & (columns < D)[None, :], rows[:, None].to(tl.int64)
        r = tl.load(inverse + rows, mask=rows < M, other=0.0)[:, None]
        n = tl.load(x + wide * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32) * r
        g = tl.load(grad + wide * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dw += g * n
        g *= w
        d = r * (g - n * (tl.sum(g * n, 1) / D)[:, None])
        tl.store(dx + wide * D + columns[None, :], narrow(d, dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * D + columns, tl.sum(dw, 0), mask=columns < D)


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
    """Outputs passed as None are skipped. Forward passes no gradients, a dense or shared feed-forward no weights."""
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
    """For each token, sums the rows of [M, D] that its K entries of `place` name (-1: none): [tokens, D]."""
    d = rows.shape[1]
    out = torch.empty(tokens, d, dtype=rows.dtype, device=rows.device)
    if tokens:
        _combine[(tokens, triton.cdiv(d, 1024))](rows, place, out, d, rows.stride(0), place.numel() // tokens, 1024)
    return out


@triton.jit
def _combine(rows, place, out, D, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k)
        total += tl.load(rows + row * stride + columns, mask=columns < tl.where(row >= 0, D, 0), other=0.0).to(
            tl.float32
        )
    tl.store(out + token * D + columns, narrow(total, out.dtype.element_ty), mask=columns < D)


# ---- the head's softmax ----


def softmax_cross_entropy(logits: Tensor, targets: Tensor, share: float, need: bool) -> Tensor:
    """Like ops/cross_entropy.py: overwrites logits [R, V] with their gradient; returns each row's loss, [R] float32."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.numel():
        _softmax[(logits.shape[0],)](logits, targets, losses, share, logits.shape[1], need, 4096, num_warps=8)
    return losses


@triton.jit
def _softmax(logits, targets, losses, share, V, NEED: tl.constexpr, BLOCK: tl.constexpr):
    """The second read of a row hits the cache."""
    row, columns = logits + tl.program_id(0).to(tl.int64) * V, tl.arange(0, BLOCK)
    target = tl.load(targets + tl.program_id(0))
    most, total = tl.full((BLOCK,), -3e38, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        v = tl.load(row + start + columns, mask=start + columns < V, other=-3e38).to(tl.float32)
        larger = tl.maximum(most, v)
        total = total * tl.exp(most - larger) + tl.exp(v - larger)
        most = larger
    largest = tl.max(most, 0)
    log_sum = largest + tl.log(tl.sum(total * tl.exp(most - largest), 0))
    tl.store(losses + tl.program_id(0), log_sum - tl.load(row + target).to(tl.float32))
    if NEED:
        tl.debug_barrier()  # the target's logit has been read
        for start in range(0, V, BLOCK):
            v = tl.load(row + start + columns, mask=start + columns < V, other=0.0).to(tl.float32)
            g = tl.exp(v - log_sum) - tl.where(start + columns == target, 1.0, 0.0)
            tl.store(row + start + columns, narrow(g * share, logits.dtype.element_ty), mask=start + columns < V)


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
