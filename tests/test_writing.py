"""What we write appears whole, by one process at a time, and what a kill left behind is taken over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from leanseek.checkpoint.files import CheckpointError, atomic_folder
from leanseek.errors import InputError, RunError
from leanseek.writing import LOCK, alone, partial_folder, replace_file, writing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_or_failing_disk_is_a_failure_of_the_run(tmp_path: Path, number: int) -> None:
    with pytest.raises(RunError, match=r"cannot be written: .*make room"), writing(tmp_path):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path, number: int) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"), writing(tmp_path, error=CheckpointError):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("kind", ["partial", "ema"])
def test_what_a_kill_left_behind_is_taken_over(tmp_path: Path, kind: str) -> None:
    left = tmp_path / f".model.{kind}"
    (left / "checkpoints").mkdir(parents=True)
    (left / "checkpoints/model.safetensors").write_bytes(b"0123")
    (left / LOCK).write_text("")
    (left / "link").symlink_to(tmp_path)
    with partial_folder(tmp_path / "model", kind) as partial:
        assert [path.name for path in partial.iterdir()] == [LOCK]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("inner", ["", "there"])
def test_two_that_write_the_same_folder_do_not_meet(tmp_path: Path, inner: str) -> None:
    """By another spelling and through a link, too."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / inner)
    with atomic_folder(tmp_path / inner / "out") as partial:
        (partial / "config.json").write_text("{}")
        for other in (tmp_path / inner / "out", tmp_path / "link" / "out"):
            with pytest.raises(InputError, match="is being written by another process"), atomic_folder(other):
                pass
    assert os.listdir(tmp_path / inner / "out") == ["config.json"]
    assert not list(tmp_path.rglob(".*"))


def test_a_lock_is_free_once_its_holder_is_gone(tmp_path: Path) -> None:
    taken = InputError("taken")
    with alone(tmp_path / LOCK, taken), pytest.raises(InputError), alone(tmp_path / LOCK, taken):
        pass
    if not (child := os.fork()):
        with alone(tmp_path / LOCK, taken):
            os._exit(0)  # as a kill: nothing is let go by hand
    assert os.waitpid(child, 0)[1] == 0
    with alone(tmp_path / LOCK, taken):
        pass


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    replace_file(tmp_path / "a.json", b"old")
    (tmp_path / ".a.json.partial").mkdir()  # where the new one would be written
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"


def test_a_lock_is_not_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), alone(tmp_path / "lock", InputError("taken")):
        pass
    assert not (tmp_path / "elsewhere").exists()
