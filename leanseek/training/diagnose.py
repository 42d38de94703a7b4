"""What was wrong with a step: asked only after one went wrong, so it may take its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from leanseek.model import Transformer


class Finding(NamedTuple):
    """A tensor to look at."""

    culprit: str  # "gradient of layers.3.self_attn.o_proj.weight"
    statistics: str  # of its values, in words


@torch.no_grad()
def find_nonfinite(model: Transformer, forward: Callable[[], object]) -> Finding:
    """The first thing that is not finite: a weight, the output of a module when `forward` runs, or a gradient.

    Gradients are those in `.grad`, in the order in which backward reached them: what came after inherits the fault.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return Finding(f"weight {name}", describe(parameter))
    found: list[Finding] = []
    hooks = [module.register_forward_hook(_note(name, found)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return Finding(f"gradient of {name}", describe(parameter.grad))
    return Finding("loss", "no tensor that it came from is")


@torch.no_grad()
def largest_gradient(model: nn.Module) -> Finding:
    """The gradient with the largest norm: where a spike of the loss would have moved the weights most."""
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    name = max(norms, key=norms.__getitem__)
    grad = model.get_parameter(name).grad
    assert grad is not None
    return Finding(f"gradient of {name}", describe(grad))


def describe(tensor: Tensor) -> str:
    """Shape, norm, largest value and how many values are not finite."""
    finite = tensor[tensor.isfinite()].float()
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return (
        f"shape {list(tensor.shape)}, {tensor.numel() - finite.numel()} values not finite, of the others norm "
        f"{float(finite.norm()):.4g} and largest {largest:.4g}"
    )


def _note(name: str, found: list[Finding]) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, inputs: object, outputs: object) -> None:
        for t in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(t, Tensor) and not _finite(t):
                found.append(Finding(f"output of {name}", describe(t)))
                return

    return hook


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
