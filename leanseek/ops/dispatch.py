"""Which implementation of an op runs: one table, one place.

An op's module holds its docstring and torch reference and calls `pick(op, *tensors)`. Fast rooms (`ops/cpu`,
`ops/triton`) register what they have with a predicate over the same tensors; the first that accepts runs.

Serving runs under `row_invariant()`, where a row's result must not depend on the rows it shares a call with. That is a
second table: only implementations registered as row-invariant are in it, torch's own (`invariant.py`) last.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Implementation:
    backend: str  # "cpu", "triton"; "torch" for the row-invariant forms in plain torch
    function: Callable[..., Any]
    accepts: Callable[..., bool]  # over the op's tensors: device, dtype, shape


_TABLE: dict[tuple[str, bool], list[Implementation]] = {}  # by op and whether it is row-invariant
_FORCED: list[str] = []  # innermost `use` last
_SCOPE = threading.local()  # .row_invariant


def register(
    op: str, backend: str, accepts: Callable[..., bool], *, row_invariant: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `function` computes `op` wherever `accepts(*tensors)` holds, within or outside `row_invariant()`.

    A row-invariant form accepts any number of rows: two that share them by count would not agree in the last bits.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _TABLE.setdefault((op, row_invariant), []).append(Implementation(backend, function, accepts))
        return function

    return add


def pick(op: str, reference: Callable[..., Any], *tensors: Tensor | None) -> Callable[..., Any]:
    """The function that computes `op` on these tensors: a registered one that accepts them, else the reference.

    Kernels read memory. Tensors without any (fake, functional, batched, of another class) and calls that are traced go
    to the reference, or to a row-invariant form, which are torch throughout.
    """
    if torch.compiler.is_compiling():
        return reference
    found = _first(op, getattr(_SCOPE, "row_invariant", False), tensors)
    return reference if found is None else found.function


def backend(op: str, row_invariant: bool, *tensors: Tensor | None) -> str:
    """What `pick` would run within or outside `row_invariant`: "torch" for the reference."""
    found = _first(op, row_invariant, tensors)
    return "torch" if found is None else found.backend


def _first(op: str, row_invariant: bool, tensors: tuple[Tensor | None, ...]) -> Implementation | None:
    forced = _FORCED[-1] if _FORCED else None
    memory = ordinary(*tensors)
    for candidate in _TABLE.get((op, row_invariant), ()):
        allowed = candidate.backend == "torch" or (memory and forced in (None, candidate.backend))
        if allowed and candidate.accepts(*tensors):
            return candidate
    return None


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether these are tensors with memory, and a call with them is neither traced nor intercepted."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or transformed():
        return False
    if torch._C._len_torch_function_stack() and torch.get_default_device().type != "cpu":
        return False  # `with torch.device("meta")`: a kernel's output would have no memory
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_meta) for t in tensors)


def transformed() -> bool:
    """Whether torch.func (vmap, grad, functionalize) is at work, which follows plain torch only."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextlib.contextmanager
def row_invariant() -> Iterator[None]:
    """Within it, on this thread, a row of an op's result does not depend on the other rows of the call, bit for bit."""
    before = getattr(_SCOPE, "row_invariant", False)
    _SCOPE.row_invariant = True
    try:
        yield
    finally:
        _SCOPE.row_invariant = before


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend within the context: "torch" (the reference), or "cpu" / "triton" where they accept the tensors.

    For tests and measurements; process-wide, so not for threads that run side by side.
    """
    _FORCED.append(backend)
    try:
        yield
    finally:
        _FORCED.pop()


def table(row_invariant: bool) -> dict[str, list[str]]:
    """Backends registered per op, in the order in which they are asked."""
    return {op: [i.backend for i in found] for (op, rows), found in sorted(_TABLE.items()) if rows == row_invariant}
