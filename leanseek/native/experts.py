"""The routed experts in training, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.native.library import DTYPES, Function, accepts, implements, kernel, pointers
from leanseek.ops.experts import grouped_experts, route_order
from leanseek.ops.weights import StoredWeight

_forward = kernel("experts_forward", "nnp ppp pppp pp p")
_backward = kernel("experts_backward", "nnp ppp pppp pp p pppp")


class _Experts(Function):
    """Keeps x and the experts' pre-activations; SwiGLU is computed again in backward (3.3.3)."""

    @staticmethod
    def forward(ctx, x, indices, weights, gate_up, down):  # type: ignore[no-untyped-def]
        n_experts, d, i = down.shape
        grouped, place, ends = route_order(indices, n_experts)
        first = torch.zeros(n_experts + 1, dtype=torch.int64)
        first[1:] = ends
        shape = torch.tensor([*indices.shape, n_experts, d, i])
        hidden = torch.empty(grouped.numel(), 2 * i, dtype=x.dtype)
        out, work = torch.empty(x.shape, dtype=x.dtype), torch.empty(grouped.numel(), d, dtype=torch.float32)
        inputs = (shape, grouped, place, first, x, weights, gate_up, down, hidden)
        _forward(DTYPES[x.dtype], DTYPES[down.dtype], *pointers(*inputs, work, out))
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        inputs, grad = ctx.saved_tensors, grad.contiguous()
        x, weights, gate_up, down, hidden = inputs[4:]
        gradients = [torch.empty(t.shape, dtype=t.dtype) for t in (x, weights, gate_up, down)]
        work = torch.empty(hidden.shape[0], x.shape[1], dtype=torch.float32)
        _backward(DTYPES[x.dtype], DTYPES[down.dtype], *pointers(*inputs, grad, work, *gradients))
        dx, dweights, dgate_up, ddown = gradients
        return dx, None, dweights, dgate_up, ddown


def _trains(x: Tensor, indices: Tensor, weights: Tensor, gate_up: StoredWeight, down: StoredWeight) -> bool:
    return isinstance(gate_up, Tensor) and isinstance(down, Tensor) and accepts(x, gate_up)


@implements(grouped_experts, _trains)
def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    weights = weights.float().contiguous()
    return _Experts.apply(x.contiguous(), indices, weights, gate_up.contiguous(), down.contiguous())
