"""The linear layer over weights of any stored form."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from leanseek.ops import deferred, products
from leanseek.ops.dispatch import op
from leanseek.ops.weights import StoredWeight, dense


@op("linear")
def linear(x: Tensor, weight: StoredWeight) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ in x's dtype.

    A weight of another floating dtype is cast to x's: master weights stay float32 under BF16 compute.
    """
    if deferred.deferring() and isinstance(weight, Tensor) and weight.requires_grad:
        return _Linear.apply(x, weight)
    return products.linear(x, dense(weight, x.dtype))


class _Linear(torch.autograd.Function):
    """What autograd does with `linear`, and the weight's gradient later."""

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return products.linear(x, dense(weight, x.dtype))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        (found,) = deferred.weight_gradients((weight,), partial(_weight_gradient, grad, x, weight.dtype))
        dx = products.linear(grad, dense(weight, x.dtype).t()) if ctx.needs_input_grad[0] else None
        return dx, found


def _weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    return (products.linear(grad.flatten(0, -2).t(), x.flatten(0, -2).t()).to(dtype),)
