"""The routed experts in three steps (2.1.2): `expert_dispatch` puts a row for each (token, choice) into the order of
experts, `expert_products` runs each expert on its rows, `expert_combine` sums each token's rows. No token is dropped.

All three are differentiable. Expert parallelism exchanges rows between them: what `Dispatched.gathered` holds goes out,
`expert_products` runs on what came in, and its rows come back for `expert_combine`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.deferred import weight_gradients
from leanseek.ops.dispatch import op, ordinary, transformed
from leanseek.ops.grouped import Groups, grouped_gradient, grouped_product
from leanseek.ops.linear import linear
from leanseek.ops.swiglu import swiglu, weighted_swiglu, weighted_swiglu_backward
from leanseek.ops.weights import FORMATS, QuantizedWeight, StoredWeight, dense


class Dispatched(NamedTuple):
    """M rows in the order of their experts: row r is x[token[r]], so that none is copied before a product reads it."""

    x: Tensor  # [N, D]; [M, D] where token is None
    ends: Tensor  # [E] int32, where each expert's rows end
    weights: Tensor  # [M] float32, each row's gate value
    token: Tensor | None = None  # [M] int64; None: row r is x[r]
    place: Tensor | None = None  # [N·K] int64, the row of each (token, choice); -1: it has none here

    def gathered(self) -> Dispatched:
        """The same rows with x [M, D]."""
        if self.token is None:
            return self
        rows = _Gather.apply(self.x, self.token, self.place) if ordinary(self.x) else self.x[self.token]
        return Dispatched(rows, self.ends, self.weights)


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: StoredWeight, down: StoredWeight) -> Tensor:
    """Σ_k weights[n, k] · down_e(silu(gate_e x_n) · up_e x_n) with e = indices[n, k]; [N, D] in x's dtype.

    x [N, D]; indices [N, K] int64; weights [N, K] float32; gate_up [E, 2I, D] (gate rows first); down [E, D, I].
    """
    sent = expert_dispatch(x, indices, weights, gate_up.shape[0])
    return expert_combine(expert_products(sent, gate_up, down), sent)


def expert_dispatch(x: Tensor, indices: Tensor, weights: Tensor, n_experts: int, rows: int | None = None) -> Dispatched:
    """x [N, D], the experts of each token [N, K] and their gate values [N, K] -> rows in the order of the experts.

    rows: how many of the choices have an expert here; the index of the others is `n_experts`. None: all of them.
    """
    order, place, ends = route_order(indices, n_experts)
    if rows is not None:
        order, place = order[:rows], place.masked_fill(place >= rows, -1)
    return Dispatched(x, ends, weights.flatten().index_select(0, order), order // indices.shape[1], place)


def expert_products(sent: Dispatched, gate_up: StoredWeight, down: StoredWeight) -> Tensor:
    """weights[r] · down_e(silu(gate_e row_r) · up_e row_r) of each row, [M, D]; weights as in `experts`."""
    if ordinary(sent.x, sent.weights, gate_up, down):
        return products_of_rows(sent, gate_up, down)
    x, ends, weights, *_ = sent.gathered()
    if not torch.compiler.is_compiling() and transformed():
        return _every_expert(x, ends, weights, dense(gate_up, x.dtype), dense(down, x.dtype))
    (up_data, *up_rest), (down_data, *down_rest) = _flat(gate_up), _flat(down)
    return _opaque(x, ends, weights, up_data, down_data, *up_rest, *down_rest)


def expert_combine(rows: Tensor, sent: Dispatched) -> Tensor:
    """The sum of each token's rows: rows [M, D] in the order of `sent` -> [N, D]."""
    assert sent.place is not None, "rows came from elsewhere: combine them where they were dispatched"
    if not ordinary(rows):
        return combine_rows(rows, sent.place, sent.x.shape[0])
    return _Combine.apply(rows, sent.token, sent.place, sent.x.shape[0])


def route_order(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the N·K (token, choice) pairs by expert.

    indices [N, K]; pairs of experts beyond the last come after all others. Returns order [N·K] (pair at each sorted
    place), place [N·K] (its inverse), and the int32 end offsets [E] of each expert's pairs.
    """
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    # torch.bincount would wait for a GPU
    ends = torch.searchsorted(flat[order], torch.arange(n_experts, device=flat.device), right=True, out_int32=True)
    return order, place, ends


@op("combine_rows")
def combine_rows(rows: Tensor, place: Tensor, tokens: int) -> Tensor:
    """The sum of each token's rows: rows [M, D], place [N·K] the rows of each token, -1 for none -> [N, D]."""
    rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))  # row -1
    return rows[place].view(tokens, place.numel() // max(1, tokens), rows.shape[1]).sum(1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token, place):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(place)
        ctx.tokens = x.shape[0]
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (place,) = ctx.saved_tensors
        return combine_rows(grad.contiguous(), place, ctx.tokens), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, token, place, tokens):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(token)
        return combine_rows(rows, place, tokens)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.index_select(0, *ctx.saved_tensors), None, None, None


# ---- the products ----


@op("expert_products")
def products_of_rows(sent: Dispatched, gate_up: StoredWeight, down: StoredWeight) -> Tensor:
    """As `expert_products`, of tensors with memory."""
    if isinstance(gate_up, QuantizedWeight) or isinstance(down, QuantizedWeight):
        return each_expert(sent, gate_up, down)
    return _Products.apply(*sent, gate_up, down)


class _Products(torch.autograd.Function):
    """Keeps x and the pre-activation; rows are gathered, SwiGLU computed and weights cast again in backward (3.3.3).

    The gate's weight multiplies the activation (I wide) rather than the output (D wide): down is linear.
    """

    @staticmethod
    def forward(ctx, x, ends, weights, token, place, gate_up, down):  # type: ignore[no-untyped-def]
        groups = Groups(weights.shape[0], x.device, ends)
        hidden = grouped_product(x, gate_up, groups, x.dtype, token)  # [M, 2I]
        out = grouped_product(weighted_swiglu(hidden, weights), down, groups, x.dtype)  # [M, D]
        ctx.save_for_backward(x, weights, token, place, gate_up, down, hidden)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weights, token, place, gate_up, down, hidden = ctx.saved_tensors
        groups, grad = ctx.groups, grad.contiguous()
        # memory peaks here: besides grad, at most one [M, D] at a time
        act, grad_hidden, grad_weights = weighted_swiglu_backward(
            hidden, weights, grouped_product(grad, down.transpose(1, 2), groups, x.dtype)
        )
        (grad_down,) = weight_gradients((down,), partial(_gradient, grad, act, groups, down.dtype))  # [E, D, I]
        del act
        grad_x = grouped_product(grad_hidden, gate_up.transpose(1, 2), groups, x.dtype)
        grad_x = grad_x if token is None else combine_rows(grad_x, place, x.shape[0])
        products = partial(_gradient, grad_hidden, x, groups, gate_up.dtype, token)  # [E, 2I, D]
        (grad_gate_up,) = weight_gradients((gate_up,), products)
        return grad_x, None, grad_weights, None, None, grad_gate_up, grad_down


def _gradient(*arguments: Any) -> tuple[Tensor]:
    return (grouped_gradient(*arguments),)


def rows_of(x: Tensor, token: Tensor | None) -> Tensor:
    """x [M, D] of each row, without a gradient."""
    return x if token is None else x.index_select(0, token)


def each_expert(sent: Dispatched, gate_up: StoredWeight, down: StoredWeight) -> Tensor:
    """One expert at a time as two linears, for inference. Quantised weights are dequantised one expert at a time;
    row-invariant if the linears are."""
    rows = rows_of(sent.x, sent.token)
    out, start = torch.empty_like(rows), 0
    for expert, end in enumerate(sent.ends.tolist()):
        if end > start:
            gate, up = linear(rows[start:end], gate_up[expert]).chunk(2, dim=-1)
            act = swiglu(gate, up) * sent.weights[start:end, None].to(rows.dtype)
            out[start:end] = linear(act, down[expert])
        start = end
    return out


# Groups are as long as the routing makes them, which no tracer can follow: to a compiler or an exporter the products
# are one operator, which finds tensors with memory when it runs. Its arguments are tensors and strings.


def _flat(weight: StoredWeight) -> tuple[Tensor, Tensor | None, str]:
    return (
        (weight.data, weight.scale, weight.format.name) if isinstance(weight, QuantizedWeight) else (weight, None, "")
    )


def _whole(data: Tensor, scale: Tensor | None, format: str) -> StoredWeight:
    return data if scale is None else QuantizedWeight(data, scale, FORMATS[format])


@torch.library.custom_op("leanseek::expert_products", mutates_args=())
def _opaque(
    rows: Tensor,
    ends: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None,
    gate_up_format: str,
    down_scale: Tensor | None,
    down_format: str,
) -> Tensor:
    both = _whole(gate_up, gate_up_scale, gate_up_format), _whole(down, down_scale, down_format)
    return products_of_rows(Dispatched(rows, ends, weights), *both)


@torch.library.custom_op("leanseek::expert_products_backward", mutates_args=())
def _opaque_backward(
    grad: Tensor, rows: Tensor, ends: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (rows, weights, gate_up, down)]
        out = products_of_rows(Dispatched(inputs[0], ends, inputs[1]), inputs[2], inputs[3])
        found = torch.autograd.grad(out, inputs, grad)
    return found[0], found[1], found[2], found[3]


@_opaque.register_fake
def _(rows: Tensor, *_: object) -> Tensor:
    return rows.new_empty(rows.shape)


@_opaque_backward.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (rows, *others))


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5])


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    drows, *rest = _opaque_backward(grad, *ctx.saved_tensors)
    return drows, None, *rest, None, None, None, None


_opaque.register_autograd(_gradients, setup_context=_keep)


def _every_expert(rows: Tensor, ends: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every row, most of them times zero: nothing that a transform cannot follow."""
    row, begins = torch.arange(rows.shape[0], device=rows.device)[:, None], torch.cat((ends.new_zeros(1), ends[:-1]))
    share = weights[:, None] * ((row >= begins) & (row < ends))  # [M, E]
    gate, up = torch.einsum("md,eid->mei", rows, gate_up).chunk(2, dim=-1)
    act = F.silu(gate) * up * share[..., None].to(rows.dtype)
    return torch.einsum("mei,edi->md", act, down)
