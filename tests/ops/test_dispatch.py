"""Declaring an op and choosing its implementation: who runs, who can be forced, and what falls back."""

import inspect
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from leanseek import ops
from leanseek.ops import dispatch
from leanseek.ops.dispatch import Op, Priority, Rows


@pytest.fixture
def op() -> Iterator[Op[..., str]]:
    """An op of these tests' own."""

    @dispatch.op("op of this test")
    def declared(x: Tensor, times: int = 1) -> str:
        """What it computes."""
        return "reference"

    yield declared
    del dispatch.OPS["op of this test"]


def add(op: Op[..., str], backend: str, accepts: bool = True, rows: Rows = Rows.ANY, priority: int = 1) -> None:
    op.register(backend, lambda x, times=1: accepts, Priority(priority), rows)(lambda x, times=1: backend)


X = torch.zeros(1)


def test_reference_where_nothing_is_registered(op: Op[..., str]) -> None:
    assert op(X) == op.reference(X) == "reference"


def test_the_op_is_documented_as_its_reference(op: Op[..., str]) -> None:
    assert op.__doc__ == "What it computes." and op.__name__ == "declared"
    assert list(inspect.signature(op).parameters) == ["x", "times"]


def test_the_highest_priority_that_accepts_runs_whatever_the_order(op: Op[..., str]) -> None:
    add(op, "late", priority=0)
    add(op, "gpu", accepts=False)
    add(op, "native")
    assert op(X) == "native"


def test_the_predicate_sees_the_arguments(op: Op[..., str]) -> None:
    op.register("native", lambda x, times=1: x.dtype == torch.float32 and times < 3, Priority.KERNEL)(
        lambda x, times=1: "native"
    )
    assert op(X) == op(X, 2) == op(X, times=2) == "native"
    assert op(torch.zeros(1, dtype=torch.float64)) == op(X, times=3) == "reference"


def test_force(op: Op[..., str]) -> None:
    """`use` holds within its block, nests, ends on an exception, and falls back where the backend does not accept."""
    add(op, "gpu")
    add(op, "native", accepts=False)
    with ops.use("native"):
        assert op(X) == "reference"
    add(op, "native")
    with ops.use("torch"):
        assert op(X) == "reference"
        with ops.use("native"):
            assert op(X) == "native"
        assert op(X) == "reference"
    with pytest.raises(RuntimeError), ops.use("torch"):
        raise RuntimeError
    assert op(X) == "gpu"
    with pytest.raises(ValueError, match="'cpu' is not one of torch, native, gpu"), ops.use("cpu"):
        pass


def test_row_invariant_forms_stand_apart(op: Op[..., str]) -> None:
    """Within `row_invariant` only row-invariant forms run; they never run outside it, and threads do not share it."""
    add(op, "native")
    assert op(X) == "native"
    with ops.row_invariant():
        assert op(X) == "reference"
    add(op, "torch", rows=Rows.INVARIANT, priority=0)
    assert op(X) == "native"
    seen = []
    with ops.row_invariant():
        assert op(X) == "torch"
        with ops.use("torch"):
            assert op(X) == "torch"
        thread = threading.Thread(target=lambda: seen.append(op(X)))
        thread.start()
        thread.join()
    assert seen == ["native"] and op(X) == "native"
    add(op, "both", rows=Rows.BOTH)
    with ops.row_invariant():
        assert op(X) == "both"


def test_backend_names_what_a_call_would_run(op: Op[..., str]) -> None:
    op.register("native", lambda x, times=1: x.dtype == torch.float32, Priority.KERNEL)(lambda x, times=1: "native")
    add(op, "gpu", rows=Rows.INVARIANT)
    half = torch.zeros(1, dtype=torch.float16)
    assert [op.backend(rows, x) for rows in (False, True) for x in (X, half)] == ["native", "torch", "gpu", "gpu"]
    assert op.backends(False) == ["native"] and op.backends(True) == ["gpu"]
    with ops.use("torch"):
        assert op.backend(False, X) == "torch"


def test_register_returns_the_function(op: Op[..., str]) -> None:
    def fast(x: Tensor, times: int = 1) -> str:
        return "fast"

    assert op.register("native", lambda *_: True, Priority.KERNEL)(fast) is fast


@pytest.mark.parametrize("name", sorted(dispatch.OPS))
def test_every_form_takes_the_op_as_it_was_declared(name: str) -> None:
    """Same parameters by name and default; one that hands all of them on (`*arguments`) takes them too."""
    op = dispatch.OPS[name]
    op.backends(False)
    expected = [(p.name, p.default) for p in inspect.signature(op.reference).parameters.values()]
    for form in (*op._forms[False], *op._forms[True]):
        found = inspect.signature(form.function).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in found):
            continue
        assert [(p.name, p.default) for p in found] == expected, form.backend
