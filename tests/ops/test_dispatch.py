"""The table of implementations: who runs, who can be forced, and what falls back."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from leanseek import ops
from leanseek.ops import dispatch


def reference(x: Tensor) -> str:
    return "reference"


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What these tests register is gone after them."""
    monkeypatch.setattr(dispatch, "_TABLE", {})
    yield


def add(backend: str, accepts: bool | type = True, row_invariant: bool = False) -> None:
    dispatch.register("op", backend, lambda x: bool(accepts), row_invariant=row_invariant)(lambda x: backend)


def run(x: Tensor | None = None) -> str:
    x = torch.zeros(1) if x is None else x
    return dispatch.pick("op", reference, x)(x)


def test_reference_where_nothing_is_registered() -> None:
    assert run() == "reference"


def test_the_first_that_accepts_runs() -> None:
    add("triton", accepts=False)
    add("cpu")
    add("late")
    assert run() == "cpu"


def test_the_predicate_sees_the_tensors() -> None:
    dispatch.register("op", "cpu", lambda x: x.dtype == torch.float32)(lambda x: "cpu")
    assert run(torch.zeros(1)) == "cpu"
    assert run(torch.zeros(1, dtype=torch.float64)) == "reference"


def test_force() -> None:
    """`use` holds within its block, nests, ends on an exception, and falls back where the backend does not accept."""
    add("triton")
    add("cpu")
    with ops.use("torch"):
        assert run() == "reference"
        with ops.use("cpu"):
            assert run() == "cpu"
        assert run() == "reference"
    with pytest.raises(RuntimeError), ops.use("torch"):
        raise RuntimeError
    assert run() == "triton"
    add("picky", accepts=False)
    with ops.use("picky"):
        assert run() == "reference"


def test_row_invariant_is_a_table_of_its_own() -> None:
    """Within `row_invariant` only row-invariant forms run; they never run outside it, and threads do not share it."""
    add("cpu")
    assert run() == "cpu"
    with ops.row_invariant():
        assert run() == "reference"
    add("torch", row_invariant=True)
    assert run() == "cpu"
    seen = []
    with ops.row_invariant():
        assert run() == "torch"
        with ops.use("torch"):
            assert run() == "torch"
        thread = threading.Thread(target=lambda: seen.append(run()))
        thread.start()
        thread.join()
    assert seen == ["cpu"] and run() == "cpu"


def test_table_lists_what_is_registered() -> None:
    add("cpu")
    add("torch", row_invariant=True)
    assert dispatch.table(False) == {"op": ["cpu"]}
    assert dispatch.table(True) == {"op": ["torch"]}


def test_backend_names_what_pick_would_run() -> None:
    dispatch.register("op", "cpu", lambda x: x.dtype == torch.float32)(lambda x: "cpu")
    dispatch.register("op", "triton", lambda x: True, row_invariant=True)(lambda x: "triton")
    half = torch.zeros(1, dtype=torch.float16)
    assert [dispatch.backend("op", rows, x) for rows in (False, True) for x in (torch.zeros(1), half)] == [
        "cpu", "torch", "triton", "triton",
    ]  # fmt: skip
    with ops.use("torch"):
        assert dispatch.backend("op", False, torch.zeros(1)) == "torch"


def test_register_returns_the_function() -> None:
    def fast(x: Tensor) -> str:
        return "fast"

    assert dispatch.register("op", "cpu", lambda x: True)(fast) is fast
