"""Kernels built before their sources changed are left out: their functions may take other arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import leanseek
from leanseek.errors import InputError
from leanseek.native import library

HERE = Path(leanseek.__file__).parent
BUILT = [v for v in library.VARIANTS if library._path(v).exists()]
pytestmark = pytest.mark.skipif(
    not BUILT or not any((HERE / "native/kernels").glob("*.cpp")), reason="no kernels here, or no sources beside them"
)


def test_cmake_and_python_hash_the_same() -> None:
    assert not any(library._stale(variant) for variant in BUILT)


@pytest.mark.parametrize("change", ["a line more", "a file more", "a file less", "a name"])
def test_any_change_of_the_sources_is_seen(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(HERE / "native/kernels", folder)
    before = library._sources.__wrapped__(folder)
    (folder / "notes.md").write_text("not a source")
    assert library._sources.__wrapped__(folder) == before
    if change == "a line more":
        (folder / "simd.h").write_text((folder / "simd.h").read_text() + "\n")
    elif change == "a file more":
        (folder / "more.h").touch()
    elif change == "a file less":
        (folder / "probe.cpp").unlink()
    else:
        (folder / "arena.h").rename(folder / "zone.h")
    assert library._sources.__wrapped__(folder) != before


def test_a_library_that_does_not_say_what_it_is_of_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there are no sources, as in a wheel."""
    monkeypatch.setattr(library, "_load", lambda variant: SimpleNamespace())
    assert library._stale(BUILT[0])
    monkeypatch.setattr(library, "_sources", lambda folder: None)
    assert not library._stale(BUILT[0])


def test_a_line_says_so_and_torch_runs(tmp_path: Path) -> None:
    shutil.copytree(HERE, tmp_path / "leanseek")
    with (tmp_path / "leanseek/native/kernels/grouped.cpp").open("a") as source:
        source.write("// an argument more\n")
    # an editable install has a finder of its own, which would find the checkout
    plain = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]"
    program = f"{plain}; from leanseek import native; native.usable_variants(); print(native.__file__); print(*native.status())"
    environment = {name: value for name, value in os.environ.items() if name != "LEANSEEK_CPU"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    where, status = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert status == f"None {library.STALE}"
    assert done.stderr == f"leanseek: CPU kernels are {library.STALE}\n"  # once


def test_asked_for_or_left_out_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(library, "_sources", lambda folder: "others")
    monkeypatch.setenv("LEANSEEK_CPU", library.NONE)
    assert library._usable.__wrapped__() == () and capsys.readouterr().err == ""
    monkeypatch.setenv("LEANSEEK_CPU", BUILT[0])
    with pytest.raises(InputError, match=f"LEANSEEK_CPU={BUILT[0]} names no kernels for this CPU; choose none"):
        library._usable.__wrapped__()
    assert library.STALE in capsys.readouterr().err
