"""Gradients of weights, computed later: the second half of a backward in two halves (3.2.1).

In a pipeline the stage before waits for the gradient of a stage's input; nobody waits for those of its weights. While
a `WeightGradients` is open, backward leaves out the products that give them, and `compute` makes up for it. What is put
off is each linear's, the gate's and the routed experts' share, in BF16 and in FP8; the gradients of norms and of the
embedding are cheap, and the head's are made in forward (cross_entropy.py): all of these come with the first half.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Products = Callable[[], tuple[Tensor, ...]]

# Not a ContextVar: on CUDA, backward runs in a thread of autograd's own.
_OPEN: list[WeightGradients] = []


class WeightGradients:
    """The products that backward put off while this was open. Open it in forward and in backward alike."""

    def __init__(self) -> None:
        self._later: deque[tuple[list[Tensor], Products]] = deque()

    def __enter__(self) -> WeightGradients:
        _OPEN.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _OPEN.pop()

    def put(self, parameters: list[Tensor], products: Products) -> None:
        self._later.append((parameters, products))

    @torch.no_grad()
    def compute(self) -> None:
        """Add what was put off to each parameter's `grad`, in the order of the backward. Hooks do not see it."""
        while self._later:
            parameters, products = self._later.popleft()
            for parameter, gradient in zip(parameters, products(), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def set_aside() -> list[WeightGradients]:
    """Close what is open, for somebody else to compute meanwhile; give it to `take_up` afterwards."""
    opened = _OPEN.copy()
    _OPEN.clear()
    return opened


def take_up(opened: list[WeightGradients]) -> None:
    """Open again what was set aside."""
    _OPEN[:] = opened


def deferring() -> bool:
    """Whether a `WeightGradients` is open."""
    return bool(_OPEN)


def weight_gradients(weights: tuple[Tensor, ...], products: Products) -> tuple[Tensor | None, ...]:
    """For a backward: products(), the gradients of `weights`; or None for each, and they come later.

    Weights that are made from others get theirs at once: autograd takes it on to those.
    """
    if not _OPEN:
        return products()
    parameters = [_parameter(weight) for weight in weights]
    if any(parameter is None for parameter in parameters):
        return products()
    _OPEN[-1].put([p for p in parameters if p is not None], products)
    return (None,) * len(weights)


def _parameter(weight: Tensor) -> Tensor | None:
    """The leaf that a saved tensor is, if it is one.

    Where hooks have packed it (recomputation does), it is another object, which autograd ties to the node that collects
    the leaf's gradient.
    """
    if not weight.requires_grad:
        return None
    node: Any = torch.autograd.graph.get_gradient_edge(weight).node
    return getattr(node, "variable", None)
