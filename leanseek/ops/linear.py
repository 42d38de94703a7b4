"""The linear layer over weights of any stored form."""

from __future__ import annotations

from torch import Tensor

from leanseek.ops import products
from leanseek.ops.dispatch import op
from leanseek.ops.weights import StoredWeight, dense


@op("linear")
def linear(x: Tensor, weight: StoredWeight) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ in x's dtype.

    A weight of another floating dtype is cast to x's: master weights stay float32 under BF16 compute.
    """
    return products.linear(x, dense(weight, x.dtype))
