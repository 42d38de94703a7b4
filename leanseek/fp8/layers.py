"""Linear and feed-forward with all their products in FP8, forward and backward (3.3.1, 3.3.2).

Kept for backward are FP8 codes of the input and of the pre-activation (3.3.3): SwiGLU is computed again, and so is
whatever is not mentioned. Weights are cast once per optimizer step (recipe.py).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from leanseek.fp8.recipe import Cast, Tilewise
from leanseek.gpu import device
from leanseek.ops import Dispatched, Groups, grouped_gradient, grouped_product, weight_gradients
from leanseek.ops.experts import combine_rows
from leanseek.ops.formats import TILE
from leanseek.ops.operands import Activation, Coded, Kept, Weight


def linear(x: Tensor, weight: Tensor, cast: Cast) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    return _Linear.apply(flat, weight, cast, *cast.input(x)).view(*x.shape[:-1], -1)


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, cast: Cast) -> Tensor:
    """down(silu(gate x) · up x): x [..., D]; gate, up [I, D]; down [D, I]."""
    flat = x.reshape(-1, x.shape[-1])
    groups = Groups(flat.shape[0], x.device)
    return _FeedForward.apply(flat, None, None, None, groups, cast, *cast.input(x), down, gate, up).view(x.shape)


def expert_products(sent: Dispatched, gate_up: Tensor, down: Tensor, cast: Cast) -> Tensor:
    """As `ops.expert_products`: gate_up [E, 2I, D], down [E, D, I] -> [M, D]. Gathers x's codes, not x."""
    groups = Groups(sent.weights.shape[0], sent.x.device, sent.ends)
    rows = sent.token, sent.place, sent.weights.float()
    return _FeedForward.apply(sent.x, *rows, groups, cast, *cast.input(sent.x), down, gate_up)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, cast, operand, kept):  # type: ignore[no-untyped-def]
        out = grouped_product(operand, cast.weight(0, x.dtype, weight), Groups(x.shape[0], x.device), x.dtype)
        ctx.save_for_backward(weight, *([x] if cast.wide_input else kept))
        ctx.cast = cast
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        weight, *kept = ctx.saved_tensors
        cast, dtype, grad = ctx.cast, grad.dtype, grad.contiguous()
        cast.note("gradient", grad, cast.recipe.gradient_tile)
        groups = Groups(grad.shape[0], grad.device)
        g = cast.recipe.both(grad, groups)
        dx = grouped_product(g.rows, cast.weight(0, dtype, weight).transpose(1, 2), groups, dtype)
        x = kept[0] if cast.wide_input else Kept(*kept)
        products = partial(_linear_gradient, cast.recipe, g.turned, x, groups, dtype, weight.dtype)
        return dx, *weight_gradients((weight,), products), None, None, None


def _linear_gradient(
    recipe: Tilewise, grad: Activation, x: Tensor | Kept, groups: Groups, dtype: torch.dtype, own: torch.dtype
) -> tuple[Tensor]:
    """Of a weight of dtype `own`: grad turned, x still to be turned, from activations in `dtype`."""
    return (grouped_gradient(grad, recipe.turn(x, groups, dtype), groups, own)[0],)


class _FeedForward(torch.autograd.Function):
    """Routed experts, or one expert that every token takes. `ups` is gate_up, or gate and up. Rows as in
    ops/experts.py: of x by `token`, or x's own (None); the gate's weight multiplies the activation."""

    @staticmethod
    def forward(ctx, x, token, place, weights, groups, cast, operand, kept, down, *ups):  # type: ignore[no-untyped-def]
        w_up, w_down = _weights(cast, x.dtype, down, ups)
        operand = operand if token is None else operand.index_select(0, token)
        hidden = grouped_product(operand, w_up, groups, x.dtype)
        act, kept_hidden = cast.recipe.swiglu(hidden, weights)
        ctx.save_for_backward(*kept, *kept_hidden, weights, token, place, down, *ups)
        ctx.cast, ctx.groups, ctx.tokens = cast, groups, x.shape[0]
        return grouped_product(act, w_down, groups, x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        codes, scales, hidden_codes, hidden_scales, weights, token, place, down, *ups = ctx.saved_tensors
        cast, recipe, groups, dtype, grad = ctx.cast, ctx.cast.recipe, ctx.groups, grad.dtype, grad.contiguous()
        cast.note("gradient", grad, cast.recipe.gradient_tile)
        w_up, w_down = _weights(cast, dtype, down, ups)
        by_rows, turned = recipe.both(grad, groups)
        # memory peaks here: besides grad, at most two [M, D] at a time
        dact = grouped_product(by_rows, w_down.transpose(1, 2), groups, dtype)
        dhidden, act, dweights = recipe.swiglu_backward(dact, Kept(hidden_codes, hidden_scales), weights, groups)
        del by_rows, dact
        (ddown,) = weight_gradients((down,), partial(_down_gradient, turned, act, groups, down))
        del turned, act
        dx = grouped_product(dhidden.rows, w_up.transpose(1, 2), groups, dtype)
        dx = dx if token is None else combine_rows(dx, place, ctx.tokens)
        x, apart = Kept(codes, scales), len(ups) == 2
        products = partial(_up_gradients, recipe, dhidden.turned, x, token, groups, dtype, down, apart)
        return dx, None, None, dweights, None, None, None, None, ddown, *weight_gradients(tuple(ups), products)


def _down_gradient(grad: Activation, act: Activation, groups: Groups, down: Tensor) -> tuple[Tensor]:
    """Both turned."""
    return (grouped_gradient(grad, act, groups, down.dtype)[..., : down.shape[-1]].reshape(down.shape),)


def _up_gradients(
    recipe: Tilewise,
    grad: Activation,
    x: Kept,
    token: Tensor | None,
    groups: Groups,
    dtype: torch.dtype,
    down: Tensor,
    apart: bool,
) -> tuple[Tensor, ...]:
    """Of gate_up or, `apart`, of gate and up: grad turned, x still to be turned, from activations in `dtype`."""
    (d, i), inner = down.shape[-2:], _inner(down)
    dups = grouped_gradient(grad, recipe.turn(x, groups, dtype, token), groups, down.dtype)
    dups = dups.view(-1, 2, inner, d)[:, :, :i].reshape(-1, 2 * i, d)
    return tuple(dups[0].chunk(2)) if apart else (dups,)


def _inner(down: Tensor) -> int:
    """The width I as the products see it: on a GPU whole tiles, zeros at the end, so that none spans gate and up."""
    return -(-down.shape[-1] // TILE) * TILE if not device.refusal(down.device) else down.shape[-1]


def _weights(cast: Cast, dtype: torch.dtype, down: Tensor, ups: tuple[Tensor, ...]) -> tuple[Weight, Weight]:
    """As [E, 2I, D] and [E, D, I]. Gate and up are cut into blocks apart, as they are published."""
    (d, i), inner = down.shape[-2:], _inner(down)
    halves = ups if len(ups) == 2 else (ups[0].view(-1, i, d),)
    joined = inner % TILE == 0  # no block of the two as one spans both
    up = cast.weight(0, dtype, *halves, shape=(inner, d), stack=2 if joined else 1)
    if not joined:
        assert isinstance(up, Tensor | Coded)
        up = up.view(-1, 2 * inner, d)
    return up, cast.weight(1, dtype, down, shape=(d, inner))
