"""What was wrong with a step: asked only after one went wrong, so it may take its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from leanseek.model import Transformer
from leanseek.training.part import Part


class Finding(NamedTuple):
    """A tensor to look at."""

    culprit: str  # "gradient of layers.3.self_attn.o_proj.weight"
    statistics: str  # of its values, in words


def find_nonfinite(model: Transformer, part: Part, run: Callable[[], object]) -> Finding:
    """The first thing that is not finite on any rank: a weight, else the output of a module, else a gradient, when
    `run` goes through the forwards and backwards of the step again.

    Gradients are looked at in the order in which backward reaches them: what came after inherits the fault.
    """
    whole = Transformer(model.config, "meta")
    parameters, modules = ([name for name, _ in named] for named in (whole.named_parameters(), whole.named_modules()))
    outputs: list[tuple[str, Tensor]] = []
    hooks = [module.register_forward_hook(_note(name, outputs)) for name, module in model.named_modules() if name]
    model.zero_grad(set_to_none=True)
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    weights = [(name, p.detach()) for name, p in model.named_parameters()]
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    found = []  # (kind, place in the order in which a step computes, name, in words)
    for kind, tensors, order in ((0, weights, parameters), (1, outputs, modules), (2, gradients, parameters[::-1])):
        found += [(kind, order.index(name), name, describe(t)) for name, t in tensors if not _finite(t)]
    each = part.gather(min(found, default=None))
    first = min(((finding, rank) for rank, finding in enumerate(each) if finding), default=None)
    if first is None:
        return Finding("loss", "no tensor that it came from is")
    (kind, _, name, statistics), rank = first
    what = ("weight", "output of", "gradient of")[kind]
    return Finding(f"{what} {name}{f' on rank {rank}' if part.ranks > 1 else ''}", statistics)


def describe(tensor: Tensor) -> str:
    """Shape, norm, largest value and how many values are not finite."""
    finite = tensor[tensor.isfinite()].float()
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return (
        f"shape {list(tensor.shape)}, {tensor.numel() - finite.numel()} values not finite, of the others norm "
        f"{float(finite.norm()):.4g} and largest {largest:.4g}"
    )


def _note(name: str, found: list[tuple[str, Tensor]]) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, inputs: object, outputs: object) -> None:
        if found and found[-1][0] != name:
            return  # what ran later inherits the fault
        found.extend((name, t.detach()) for t in _tensors(outputs) if not _finite(t))

    return hook


def _tensors(outputs: object) -> list[Tensor]:
    return [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(t, Tensor)]


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
