"""Linear and feed-forward with all their products in FP8, forward and backward (3.3.1, 3.3.2).

Kept for backward are FP8 codes of the input and of the pre-activation (3.3.3): SwiGLU is computed again, and so is
whatever is not mentioned. Weights are cast once per optimizer step (recipe.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.fp8.products import cuts, grouped_gradient, grouped_product, product
from leanseek.fp8.recipe import Cast
from leanseek.gpu import device
from leanseek.ops import Groups
from leanseek.ops.experts import combine_rows, route_order
from leanseek.ops.formats import TILE
from leanseek.ops.quantize import Coded, Kept, Operand, Weight, take


def linear(x: Tensor, weight: Tensor, cast: Cast) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ in x's dtype."""
    operand, kept = _input(x, cast)
    return _Linear.apply(x, weight, cast, operand, kept)


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, cast: Cast) -> Tensor:
    """down(silu(gate x) · up x): x [..., D]; gate, up [I, D]; down [D, I]."""
    return _FeedForward.apply(x, None, None, cast, *_input(x, cast), down, gate, up)


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, cast: Cast) -> Tensor:
    """As `ops.experts`: x [N, D], indices and weights [N, K], gate_up [E, 2I, D], down [E, D, I] -> [N, D]."""
    return _FeedForward.apply(x, indices, weights, cast, *_input(x, cast), down, gate_up)


def _input(x: Tensor, cast: Cast) -> tuple[Operand, Kept]:
    """x [..., K] in 1×128 tiles. Modules that read the same tensor share its codes: they travel with it.

    Not with an input that is kept wide, which would hold on to them until backward.
    """
    key = (type(cast.recipe), cast.recipe.power_of_two, x._version)
    found = getattr(x, "_fp8_rows", None)
    if found is None or found[0] != key:
        flat = x.detach().reshape(-1, x.shape[-1])
        found = (key, *cast.recipe.rows(flat))
        if not cast.wide_input:
            x._fp8_rows = found  # type: ignore[attr-defined]
    if cast.seen is not None:
        cast.note("input", x.detach().reshape(-1, x.shape[-1]))
    return found[1], found[2]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, cast, operand, kept):  # type: ignore[no-untyped-def]
        out = product(operand, take(cast.weight(0, x.dtype, weight), 0), cuts(x.shape[-1]), x.dtype)
        ctx.save_for_backward(weight, *([x] if cast.wide_input else kept))
        ctx.cast, ctx.shape = cast, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        weight, *kept = ctx.saved_tensors
        cast, dtype, columns = ctx.cast, grad.dtype, ctx.shape[-1]
        grad = grad.reshape(-1, weight.shape[0]).contiguous()
        cast.note("gradient", grad)
        groups = Groups(grad.shape[0], grad.device)
        g = cast.recipe.both(grad, groups)
        dx = product(g.rows, take(cast.weight(0, dtype, weight), 0).t(), cuts(weight.shape[0]), dtype)
        x = kept[0].reshape(-1, columns) if cast.wide_input else Kept(*kept)
        turned = cast.recipe.turn(x, groups, dtype)
        dweight = grouped_gradient(g.turned, turned, groups, weight.dtype)
        return dx.view(ctx.shape), dweight[0], None, None, None


class _FeedForward(torch.autograd.Function):
    """Of routed experts, or of one that every token takes (indices None). `ups` is gate_up, or gate and up.

    A row is a (token, choice) pair, sorted by expert. The gate's weight multiplies the activation (ops/experts.py).
    """

    @staticmethod
    def forward(ctx, x, indices, weights, cast, operand, kept, down, *ups):  # type: ignore[no-untyped-def]
        d = down.shape[-2]
        flat = x.reshape(-1, d)
        inner = _inner(down)
        w_up, w_down = _weights(cast, x.dtype, down, ups, inner)
        token = place = row_weight = None
        groups = Groups(flat.shape[0], x.device)
        if indices is not None:
            order, place, ends = route_order(indices, down.shape[0])
            token, groups = order // indices.shape[1], Groups(order.numel(), x.device, ends)
            row_weight = weights.float().flatten()[order]
            operand = take(operand, token)
        hidden = grouped_product(operand, w_up, groups, cuts(d), x.dtype)
        act, kept_hidden = cast.recipe.swiglu(hidden, row_weight)
        out = grouped_product(act, w_down, groups, cuts(inner), x.dtype)
        ctx.save_for_backward(*kept, *kept_hidden, row_weight, token, place, down, *ups)
        ctx.cast, ctx.groups, ctx.shape = cast, groups, x.shape
        out = out if place is None else combine_rows(out, place, flat.shape[0])
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        codes, scales, hidden_codes, hidden_scales, row_weight, token, place, down, *ups = ctx.saved_tensors
        cast, recipe, groups, dtype = ctx.cast, ctx.cast.recipe, ctx.groups, grad.dtype
        d, i = down.shape[-2:]
        inner = _inner(down)
        grad = grad.reshape(-1, d).contiguous()
        cast.note("gradient", grad)
        w_up, w_down = _weights(cast, dtype, down, ups, inner)
        if token is None:
            g, g_turned = recipe.both(grad, groups)
        else:
            g, g_turned = take(recipe.rows(grad)[0], token), recipe.turn(grad, groups, dtype, token)
        dact = grouped_product(g, w_down.transpose(1, 2), groups, cuts(d), dtype)
        found = recipe.swiglu_backward(dact, Kept(hidden_codes, hidden_scales), row_weight, groups)
        ddown = grouped_gradient(g_turned, found.act, groups, down.dtype)[..., :i]
        x_turned = recipe.turn(Kept(codes, scales), groups, dtype, token)
        dups = grouped_gradient(found.hidden.turned, x_turned, groups, down.dtype)
        dups = dups.view(-1, 2, inner, d)[:, :, :i].reshape(-1, 2 * i, d)
        dx = grouped_product(found.hidden.rows, w_up.transpose(1, 2), groups, cuts(2 * inner, halves=2), dtype)
        dx = (dx if place is None else combine_rows(dx, place, grad.shape[0])).view(ctx.shape)
        dweights = None if place is None else found.weight[place].view(grad.shape[0], -1)
        split = dups[0].chunk(2) if len(ups) == 2 else [dups]
        return dx, None, dweights, None, None, None, ddown.reshape(down.shape), *split


def _inner(down: Tensor) -> int:
    """The width I as the products see it: on a GPU whole tiles, zeros at the end, so that none spans gate and up."""
    return -(-down.shape[-1] // TILE) * TILE if not device.refusal(down.device) else down.shape[-1]


def _weights(
    cast: Cast, dtype: torch.dtype, down: Tensor, ups: tuple[Tensor, ...], inner: int
) -> tuple[Weight, Weight]:
    """As [E, 2I, D] and [E, D, I]. Gate and up are cut into blocks apart, as they are published."""
    d, i = down.shape[-2:]
    halves = ups if len(ups) == 2 else (ups[0].view(-1, i, d),)
    joined = inner % TILE == 0  # no block of the two as one spans both
    up = cast.weight(0, dtype, *halves, shape=(inner, d), stack=2 if joined else 1)
    if not joined:
        assert isinstance(up, Tensor | Coded)
        up = up.view(-1, 2 * inner, d)
    return up, cast.weight(1, dtype, down, shape=(d, inner))
