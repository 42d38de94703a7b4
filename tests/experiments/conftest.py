"""The modules of experiments, which are scripts beside each other and no package."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@contextmanager
def scripts(folder: Path, modules: Sequence[str]) -> Iterator[dict[str, ModuleType]]:
    """By name, imported as they run: with their folder on the path."""
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    sys.path.insert(0, str(folder))
    yield {name: import_module(name) for name in modules}
    sys.path.remove(str(folder))
    for name in modules:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture(scope="module")
def reason() -> Iterator[dict[str, ModuleType]]:
    with scripts(EXPERIMENTS / "reason", ("data", "page", "pairs", "run")) as modules:
        yield modules


@pytest.fixture(scope="module")
def long_context() -> Iterator[dict[str, ModuleType]]:
    with scripts(EXPERIMENTS / "long-context", ("data", "run")) as modules:
        yield modules
