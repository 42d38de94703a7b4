"""MLA's expanded form on a GPU: cuDNN's attention, with one pass before it and one after (2.1.1, eq. 3 to 10).

Backward keeps q and kv as the up-projections wrote them, before the rotation. A caller that recomputes them from the
latents (3.2.3) therefore stores neither.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton types a kernel's arguments)
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.gpu.device import complaint
from leanseek.gpu.numbers import narrow

aten = torch.ops.aten
HEADS, WARPS = 8, 2  # heads that a program handles at a time


@functools.cache
def refusal(width: int, value_width: int, device: torch.device) -> str:
    """Why cuDNN cannot attend in BF16 with these head widths; empty if a small trial succeeds."""
    try:
        q, k = torch.ones(2, 1, 128, 2, width, dtype=torch.bfloat16, device=device)
        v = torch.ones(1, 128, 2, value_width, dtype=torch.bfloat16, device=device)
        out, kept = attend(q, k, v, width**-0.5)
        attend_backward(out, q, k, v, out, kept, width**-0.5)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever the library raises is the reason
        return complaint(error)
    return ""


class MLAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, k_rope, cos, sin, scale, interleave):
        query, key = place_heads(q, kv, k_rope, cos, sin, interleave)
        out, kept = attend(query, key, kv[..., q.shape[-1] - k_rope.shape[-1] :], scale)
        ctx.save_for_backward(q, kv, k_rope, cos, sin, out, *kept)
        ctx.scale, ctx.interleave = scale, interleave
        return out

    @staticmethod
    def backward(ctx, grad):
        q, kv, k_rope, cos, sin, out, *kept = ctx.saved_tensors
        query, key = place_heads(q, kv, k_rope, cos, sin, ctx.interleave)
        value = kv[..., q.shape[-1] - k_rope.shape[-1] :]
        grads = attend_backward(grad, query, key, value, out, kept, ctx.scale)
        return *gather_gradients(*grads, cos, sin, ctx.interleave), None, None, None, None


# ---- cuDNN ----


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, list[Tensor]]:
    """Causal; q, k [B, T, H, dk], v [B, T, H, dv] -> [B, T, H, dv], and what its backward also needs."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, log_sum, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return out.transpose(1, 2), [log_sum, seed, offset]


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    length = q.shape[1]
    grad, q, k, v, out = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    log_sum, seed, offset = kept
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, log_sum, seed, offset, None, None, None, length, length, 0.0, True, scale=scale
    )
    dq, dk, dv = (t.transpose(1, 2).contiguous() for t in grads)
    return dq, dk, dv


# ---- around it ----


def place_heads(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, interleave: bool
) -> tuple[Tensor, Tensor]:
    """Queries [q_C; RoPE(q_R)] and keys [k_C; RoPE(k_R)] of every head, [B, T, H, nope + rope] (eq. 4, 9).

    q, kv contiguous, k_rope [B, T, rope] with any strides of its rows, cos and sin [B or 1, T, rope / 2] contiguous.
    """
    query, key = torch.empty_like(q), torch.empty_like(q)
    _launch(_place, q, kv, k_rope, cos, sin, query, key, interleave=interleave)
    return query, key


def gather_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, interleave: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns gradients of `place_heads`' results and of the values into gradients of q (written over dq), kv and k_rope.

    The gradient of k_rope sums over the heads, which all share k_R.
    """
    rope = 2 * cos.shape[-1]
    dkv = dk.new_empty(*dk.shape[:3], dk.shape[3] - rope + dv.shape[3])
    dk_rope = dk.new_empty(*dk.shape[:2], rope)
    _launch(_gather, dq, dkv, dk_rope, cos, sin, dk, dv, interleave=interleave)
    return dq, dkv, dk_rope


def _launch(kernel, q, kv, k_rope, cos, sin, *rest, interleave):
    batch, length, heads, width = q.shape
    rope = k_rope.shape[-1]
    nope, angle_stride = width - rope, 0 if cos.shape[0] == 1 else cos.stride(0)
    kernel[(length, batch)](
        q, kv, k_rope, cos, sin, *rest, length, heads, nope, kv.shape[-1] - nope, k_rope.stride(0), k_rope.stride(1),
        angle_stride, interleave, rope // 2, triton.next_power_of_2(rope // 2),
        triton.next_power_of_2(max(nope, kv.shape[-1] - nope)), min(HEADS, triton.next_power_of_2(heads)),
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _place(
    q, kv, k_rope, cos, sin, query, key, T, H, nope, v, stride_b, stride_t, angle_stride,
    INTERLEAVE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, shared, pair, first, second, c, s = _token(
        k_rope, cos, sin, T, stride_b, stride_t, angle_stride, INTERLEAVE, HALF, PAIRS
    )
    columns, width = tl.arange(0, BLOCK), nope + 2 * HALF
    x = tl.load(shared + first, mask=pair < HALF, other=0.0).to(tl.float32)
    y = tl.load(shared + second, mask=pair < HALF, other=0.0).to(tl.float32)
    kind = query.dtype.element_ty
    k_first, k_second = narrow(x * c - y * s, kind)[None, :], narrow(y * c + x * s, kind)[None, :]
    for start in range(0, H, HEADS):
        heads = start + tl.arange(0, HEADS)
        here = (heads < H)[:, None]
        row, own = (token * H + heads)[:, None] * width, (token * H + heads)[:, None] * (nope + v)
        inside, rotated = here & (columns < nope)[None, :], here & (pair < HALF)[None, :]
        tl.store(query + row + columns[None, :], tl.load(q + row + columns[None, :], mask=inside), mask=inside)
        tl.store(key + row + columns[None, :], tl.load(kv + own + columns[None, :], mask=inside), mask=inside)
        qx = tl.load(q + row + nope + first[None, :], mask=rotated, other=0.0).to(tl.float32)
        qy = tl.load(q + row + nope + second[None, :], mask=rotated, other=0.0).to(tl.float32)
        halves = row + nope + pair[None, :]
        tl.store(query + halves, narrow(qx * c[None, :] - qy * s[None, :], kind), mask=rotated)
        tl.store(query + halves + HALF, narrow(qy * c[None, :] + qx * s[None, :], kind), mask=rotated)
        tl.store(key + halves, tl.broadcast_to(k_first, (HEADS, PAIRS)), mask=rotated)
        tl.store(key + halves + HALF, tl.broadcast_to(k_second, (HEADS, PAIRS)), mask=rotated)


@triton.jit
def _gather(
    dq, dkv, dk_rope, cos, sin, dk, dv, T, H, nope, v, stride_b, stride_t, angle_stride,
    INTERLEAVE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, shared, pair, first, second, c, s = _token(
        dk_rope, cos, sin, T, stride_b, stride_t, angle_stride, INTERLEAVE, HALF, PAIRS
    )
    columns, width = tl.arange(0, BLOCK), nope + 2 * HALF
    sum_x, sum_y = tl.zeros((PAIRS,), tl.float32), tl.zeros((PAIRS,), tl.float32)
    kind = dq.dtype.element_ty
    for start in range(0, H, HEADS):
        heads = start + tl.arange(0, HEADS)
        here = (heads < H)[:, None]
        row, own = (token * H + heads)[:, None] * width, (token * H + heads)[:, None] * (nope + v)
        inside, values = here & (columns < nope)[None, :], here & (columns < v)[None, :]
        tl.store(dkv + own + columns[None, :], tl.load(dk + row + columns[None, :], mask=inside), mask=inside)
        value = tl.load(dv + (token * H + heads)[:, None] * v + columns[None, :], mask=values)
        tl.store(dkv + own + nope + columns[None, :], value, mask=values)
        rotated, halves = here & (pair < HALF)[None, :], row + nope + pair[None, :]
        x = tl.load(dk + halves, mask=rotated, other=0.0).to(tl.float32)
        y = tl.load(dk + halves + HALF, mask=rotated, other=0.0).to(tl.float32)
        sum_x += tl.sum(x, 0)
        sum_y += tl.sum(y, 0)
        x = tl.load(dq + halves, mask=rotated, other=0.0).to(tl.float32)
        y = tl.load(dq + halves + HALF, mask=rotated, other=0.0).to(tl.float32)
        tl.debug_barrier()  # every read of dq comes before the writes
        tl.store(dq + row + nope + first[None, :], narrow(x * c[None, :] + y * s[None, :], kind), mask=rotated)
        tl.store(dq + row + nope + second[None, :], narrow(y * c[None, :] - x * s[None, :], kind), mask=rotated)
    tl.store(shared + first, narrow(sum_x * c + sum_y * s, kind), mask=pair < HALF)
    tl.store(shared + second, narrow(sum_y * c - sum_x * s, kind), mask=pair < HALF)


@triton.jit
def _token(
    k_rope, cos, sin, T, stride_b, stride_t, angle_stride,
    INTERLEAVE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The program's token: its number, its row of k_rope, where its pairs are before the rotation, cosines and sines.

    After the rotation the first elements of all pairs come before the second ones.
    """
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    if INTERLEAVE:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + HALF
    places = b * angle_stride + t * HALF + pair
    c = tl.load(cos + places, mask=pair < HALF, other=1.0)
    s = tl.load(sin + places, mask=pair < HALF, other=0.0)
    return b * T + t, k_rope + b * stride_b + t * stride_t, pair, first, second, c, s
