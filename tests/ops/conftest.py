"""Each op is held to its formula in every form that this machine has."""

from collections.abc import Iterator

import pytest

from leanseek import native, ops

BACKENDS = ["torch", "native"] if native.usable_variants() else ["torch"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, then the native kernels, if there are any, where they accept the tensors."""
    with ops.use(request.param):
        yield request.param


@pytest.fixture(params=[*BACKENDS, "row-invariant"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Also the row-invariant forms, which serve and have no backward."""
    with ops.row_invariant() if request.param == "row-invariant" else ops.use(request.param):
        yield request.param
