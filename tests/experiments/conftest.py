"""The modules of experiments/reason, which are scripts beside each other and no package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "experiments/reason"
MODULES = ("data", "page", "pairs", "run")


@pytest.fixture(scope="module")
def reason() -> Iterator[dict[str, ModuleType]]:
    """By name, imported as they run: with their folder on the path."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    yield {name: import_module(name) for name in MODULES}
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)
