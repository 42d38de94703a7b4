"""The routed experts: each runs once, on all tokens that chose it (2.1.2). No token is dropped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.dispatch import op, ordinary, transformed
from leanseek.ops.products import linear, multiply
from leanseek.ops.weights import FORMATS, QuantizedWeight, StoredWeight, dense


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: StoredWeight, down: StoredWeight) -> Tensor:
    """Σ_k weights[n, k] · down_e(silu(gate_e x_n) · up_e x_n) with e = indices[n, k]; [N, D] in x's dtype.

    x [N, D]; indices [N, K] int64; weights [N, K] float32; gate_up [E, 2I, D] (gate rows first); down [E, D, I].
    """
    if not torch.compiler.is_compiling() and transformed():
        return _all_experts(x, indices, weights, dense(gate_up, x.dtype), dense(down, x.dtype))
    if not ordinary(x, weights, gate_up, down):
        (up_data, *up_rest), (down_data, *down_rest) = _flat(gate_up), _flat(down)
        return _opaque(x, indices, weights, up_data, down_data, *up_rest, *down_rest)
    return grouped_experts(x, indices, weights, gate_up, down)


@op("experts")
def grouped_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: StoredWeight, down: StoredWeight) -> Tensor:
    if isinstance(gate_up, QuantizedWeight) or isinstance(down, QuantizedWeight):
        return _quantized_experts(x, indices, weights, gate_up, down)
    return _Experts.apply(x, indices, weights, gate_up.to(x.dtype), down.to(x.dtype))


def route_order(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the N·K (token, choice) pairs by expert.

    indices [N, K]. Returns order [N·K] (pair at each sorted place), place [N·K] (its inverse), and the int32 end
    offsets [E] of each expert's pairs.
    """
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    # torch.bincount would wait for a GPU
    ends = torch.searchsorted(flat[order], torch.arange(n_experts, device=flat.device), right=True, out_int32=True)
    return order, place, ends


# Groups are as long as the routing makes them, which no tracer can follow: to a compiler or an exporter
# the experts are one operator, which finds tensors with memory when it runs. Its arguments are tensors and strings.


def _flat(weight: StoredWeight) -> tuple[Tensor, Tensor | None, str]:
    return (
        (weight.data, weight.scale, weight.format.name) if isinstance(weight, QuantizedWeight) else (weight, None, "")
    )


def _whole(data: Tensor, scale: Tensor | None, format: str) -> StoredWeight:
    return data if scale is None else QuantizedWeight(data, scale, FORMATS[format])


@torch.library.custom_op("leanseek::experts", mutates_args=())
def _opaque(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None,
    gate_up_format: str,
    down_scale: Tensor | None,
    down_format: str,
) -> Tensor:
    both = _whole(gate_up, gate_up_scale, gate_up_format), _whole(down, down_scale, down_format)
    return grouped_experts(x, indices, weights, *both)


@torch.library.custom_op("leanseek::experts_backward", mutates_args=())
def _opaque_backward(
    grad: Tensor, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        # Cast here: inside an operator autograd sees `_Experts`, but no `.to` before it.
        inputs = [t.detach().requires_grad_() for t in (x, weights, gate_up.to(x.dtype), down.to(x.dtype))]
        out = grouped_experts(inputs[0], indices, inputs[1], inputs[2], inputs[3])
        found = torch.autograd.grad(out, inputs, grad)
    return found[0], found[1], found[2].to(gate_up.dtype), found[3].to(down.dtype)


@_opaque.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@_opaque_backward.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, *others))


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5])


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    x, indices, *others = ctx.saved_tensors
    dx, *rest = _opaque_backward(grad, x, indices, *others)
    return dx, None, *rest, None, None, None, None


_opaque.register_autograd(_gradients, setup_context=_keep)


def _all_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every token, most of them times zero: nothing that a transform cannot follow."""
    share = weights.new_zeros(x.shape[0], gate_up.shape[0]).scatter(1, indices, weights)  # [N, E]
    gate, up = torch.einsum("nd,eid->nei", x, gate_up).chunk(2, dim=-1)
    act = F.silu(gate) * up * share[..., None].to(x.dtype)
    return torch.einsum("nei,edi->nd", act, down)


def _grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows of a [M, in] times its b [E, in, out] -> [M, out]; or, for two matrices a [out, M] and
    b [M, in] whose shared side is cut at `ends`, one product an expert -> [E, out, in] (zero for an empty expert)."""
    if a.is_cuda and a.dtype == torch.bfloat16:  # what the GPU kernel takes
        return F.grouped_mm(a, b, offs=ends)
    stops = ends.tolist()
    slices = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    if b.ndim == 3:
        out = a.new_empty(a.shape[0], b.shape[2])
        for expert, rows in enumerate(slices):
            multiply(a[rows], b[expert], out[rows])
        return out
    out = a.new_empty(len(stops), a.shape[0], b.shape[1])
    for expert, rows in enumerate(slices):
        multiply(a[:, rows], b[rows], out[expert])
    return out


class _Experts(torch.autograd.Function):
    """Grouped products with a backward that keeps only x and the pre-activation; SwiGLU is recomputed (3.3.3).

    The gate's weight multiplies the activation (I wide) rather than the output (D wide): the down projection is
    linear, so the sum is the same and the combine is a plain sum of K rows.
    """

    @staticmethod
    def forward(ctx, x, indices, weights, gate_up, down):  # type: ignore[no-untyped-def]
        n, k = indices.shape
        order, place, ends = route_order(indices, gate_up.shape[0])
        token = order // k
        hidden = _grouped(x.index_select(0, token), gate_up.transpose(1, 2), ends)  # [N·K, 2I]
        weight = weights.flatten()[order].to(x.dtype)
        act = weighted_swiglu(hidden, weight)
        out = _grouped(act, down.transpose(1, 2), ends)  # [N·K, D]
        ctx.save_for_backward(x, weight, gate_up, down, hidden, token, place, ends)
        ctx.k = k
        return combine_rows(out, place, n)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, gate_up, down, hidden, token, place, ends = ctx.saved_tensors
        grad_out = grad.index_select(0, token)  # [N·K, D]
        grad_act = _grouped(grad_out, down, ends)  # [N·K, I]
        act, grad_hidden, grad_weight = weighted_swiglu_backward(hidden, weight, grad_act)
        grad_down = _grouped(grad_out.t(), act, ends)  # [E, D, I]
        grad_gate_up = _grouped(grad_hidden.t(), x.index_select(0, token), ends)  # [E, 2I, D]
        grad_x = combine_rows(_grouped(grad_hidden, gate_up, ends), place, x.shape[0])
        return grad_x, None, grad_weight[place].view(-1, ctx.k), grad_gate_up, grad_down


@op("combine_rows")
def combine_rows(rows: Tensor, place: Tensor, tokens: int) -> Tensor:
    """The sum of each token's rows: rows [N·K, D] as `route_order` sorts them, place its inverse -> [N, D]."""
    return rows.index_select(0, place).view(tokens, place.numel() // max(1, tokens), rows.shape[1]).sum(1)


@op("weighted_swiglu")
def weighted_swiglu(hidden: Tensor, weight: Tensor) -> Tensor:
    """weight [M] · silu(gate) · up of hidden [M, 2I]."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up * weight[:, None]


@op("weighted_swiglu_backward")
def weighted_swiglu_backward(hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`weighted_swiglu` again, and the gradients of hidden and weight."""
    gate, up = hidden.chunk(2, dim=-1)
    sig = torch.sigmoid(gate)
    silu = gate * sig
    act = silu * up
    grad_weight = (grad * act).sum(-1, dtype=torch.float32)
    grad = grad * weight[:, None]
    grad_hidden = torch.cat((grad * up * (sig + silu * (1 - sig)), grad * silu), dim=-1)
    return act * weight[:, None], grad_hidden, grad_weight


def _quantized_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: StoredWeight, down: StoredWeight
) -> Tensor:
    """Quantised experts, dequantised one at a time so that memory stays near the stored size (inference only)."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in indices.unique().tolist():
        token, choice = (indices == expert).nonzero(as_tuple=True)
        gate, up = linear(x[token], dense(gate_up[expert], x.dtype)).chunk(2, dim=-1)
        act = F.silu(gate) * up * weights[token, choice, None].to(x.dtype)
        out.index_add_(0, token, linear(act, dense(down[expert], x.dtype)).float())
    return out.to(x.dtype)
