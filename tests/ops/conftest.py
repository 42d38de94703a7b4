"""Each op is held to its formula in every form that this machine has."""

from collections.abc import Iterator

import pytest

from leanseek import ops


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, then the native kernels where they accept the tensors (the reference again where they do not)."""
    with ops.use(request.param):
        yield request.param


@pytest.fixture(params=["torch", "native", "row-invariant"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Also the row-invariant forms, which serve and have no backward."""
    with ops.row_invariant() if request.param == "row-invariant" else ops.use(request.param):
        yield request.param
