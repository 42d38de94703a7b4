"""Which implementation of an op runs is decided here.

An op is declared once, by its torch reference: `@op` turns the reference into the op, signature and docstring
included. Rooms with faster forms (`native/`, `gpu/`) register them with a predicate over the op's own arguments; of
those that accept a call, the one of the highest priority runs, else the reference.

Serving runs under `row_invariant()`, where a row's result must not depend on the rows it shares a call with. Only forms
registered as row-invariant run there, torch's own (`invariant.py`) with the lowest priority.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

BACKENDS = ("torch", "native", "gpu")
ROOMS = ("leanseek.ops.invariant", "leanseek.native", "leanseek.gpu")  # imported at the first call of an op


class Priority(IntEnum):
    """Among the forms that accept a call, the one with the highest priority runs."""

    TORCH = 0
    KERNEL = 1


class Rows(IntEnum):
    """Where a form may run: outside `row_invariant()`, within it, or in both places."""

    ANY = 1
    INVARIANT = 2
    BOTH = 3


@dataclass(frozen=True)
class Implementation:
    backend: str  # "native", "gpu"; "torch" for the row-invariant forms in plain torch
    function: Callable[..., Any]
    accepts: Callable[..., bool]  # over the op's arguments: device, dtype, shape
    priority: Priority


OPS: dict[str, Op[..., Any]] = {}  # every op by its name
_FORCED: list[str] = []  # innermost `use` last
_SCOPE = threading.local()  # .row_invariant


class Op(Generic[P, R]):
    """Called, it runs the best implementation for its arguments.

    Kernels read memory. Tensors without any (fake, functional, batched, of another class) and calls that are traced go
    to the reference, or to a row-invariant form in torch.
    """

    def __init__(self, reference: Callable[P, R], name: str):
        functools.update_wrapper(self, reference)
        self.name, self.reference = name, reference
        self._forms: dict[bool, list[Implementation]] = {False: [], True: []}  # by whether they are row-invariant

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return self.reference(*args, **kwargs)
        found = self._first(getattr(_SCOPE, "row_invariant", False), args, kwargs)
        run: Callable[P, R] = self.reference if found is None else found.function
        return run(*args, **kwargs)

    def register(
        self, backend: str, accepts: Callable[..., bool], priority: Priority, rows: Rows = Rows.ANY
    ) -> Callable[[F], F]:
        """Decorator: the function computes the op wherever `accepts`, called as the op is, holds.

        A row-invariant form must accept any number of rows: if two forms split calls by the number of rows, their
        results would differ in the last bits.
        """

        def add(function: F) -> F:
            for invariant in (False, True):
                if rows & (Rows.INVARIANT if invariant else Rows.ANY):
                    forms = self._forms[invariant]
                    forms.append(Implementation(backend, function, accepts, priority))
                    forms.sort(key=lambda form: -form.priority)
            return function

        return add

    def backend(self, row_invariant: bool, *args: Any, **kwargs: Any) -> str:
        """What a call would run within or outside `row_invariant`: "torch" for the reference."""
        found = self._first(row_invariant, args, kwargs)
        return "torch" if found is None else found.backend

    def backends(self, row_invariant: bool) -> list[str]:
        """Backends of the registered forms, in the order they are tried."""
        _open_rooms()
        return [form.backend for form in self._forms[row_invariant]]

    def _first(self, row_invariant: bool, args: Any, kwargs: Any) -> Implementation | None:
        _open_rooms()
        if not (forms := self._forms[row_invariant]):
            return None
        chosen, memory = forced(), ordinary(*args, *kwargs.values())
        for form in forms:
            allowed = form.backend == "torch" or (memory and chosen in (None, form.backend))
            if allowed and form.accepts(*args, **kwargs):
                return form
        return None


def op(name: str) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorator: declare the op of which this function is the torch reference."""

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        OPS[name] = declared = Op(reference, name)
        return declared

    return declare


@functools.cache
def _open_rooms() -> None:
    for room in ROOMS:
        importlib.import_module(room)


def forced() -> str | None:
    """The backend of the innermost `use`."""
    return _FORCED[-1] if _FORCED else None


def ordinary(*arguments: object) -> bool:
    """Whether all tensors among these have memory, and a call with them is neither traced nor intercepted."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or transformed():
        return False
    if torch._C._len_torch_function_stack() and torch.get_default_device().type != "cpu":
        return False  # `with torch.device("meta")`: a kernel's output would have no memory
    return all(map(_has_memory, arguments))


def _has_memory(argument: object) -> bool:
    """True for anything that is not a tensor or a module of tensors."""
    if isinstance(argument, Tensor):
        return type(argument) in (Tensor, nn.Parameter) and not argument.is_meta
    return not isinstance(argument, nn.Module) or all(map(_has_memory, argument.buffers()))


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
    """Force a backend within the context: "torch" (the reference), or "native" / "gpu" where they accept the call.

    For tests and measurements; process-wide, so not for threads that run side by side.

    Raises:
        ValueError: there is no backend of that name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    _FORCED.append(backend)
    try:
        yield
    finally:
        _FORCED.pop()
