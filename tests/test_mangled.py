"""Mangled files of every kind are one line or a right result; `python tests/mangle.py` runs for longer."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # a script too: no package

import mangle


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("whole")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    mangle.build(folder)
    yield folder
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


def test_whole_files_are_read(root: Path) -> None:
    """Nothing below is refused for another reason than what was mangled."""
    for folder, opener in dict.fromkeys((folder, opener) for folder, _, opener in mangle.TARGETS):
        opener(root / folder)


def test_mangled_files_are_refused_in_a_line_or_read(root: Path) -> None:
    wrong = [f"{what}\n{said}" for what, said in mangle.inputs(root, seed=0, count=2 * len(mangle.TARGETS)) if said]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (lambda path: 1 / 0, "ZeroDivisionError"),
        (lambda path: bytearray(2 * mangle.MEMORY), "MemoryError"),
        (lambda path: os.kill(os.getpid(), 9), "signal 9"),
        (lambda path: sys.exit(3), "SystemExit"),
    ],
)
def test_the_judge_sees_what_is_wrong(does: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    assert says in mangle.judge(does, tmp_path)
