"""Writes files atomically and by one process at a time; errors of the operating system become one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from leanseek.errors import InputError, RunError

LOCK = ".lock"  # in a folder that is being written


@contextlib.contextmanager
def writing(
    path: Path, then: str = "make room and run it again", error: type[InputError] = InputError
) -> Iterator[None]:
    """Turns an OSError while writing below `path` into one line.

    Raises:
        RunError: the disk is full or fails, or `ulimit -f` is reached; `then` says what to do.
        error: `path` cannot be written for another reason.
    """
    try:
        yield
    except OSError as reason:
        where = f" ({reason.filename})" if reason.filename and str(reason.filename) != str(path) else ""
        if reason.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"the disk at {mount_point(path)} is full, {path} cannot be written: {then}") from None
        if reason.errno in (errno.EFBIG, errno.EIO):
            raise RunError(f"{path} cannot be written: {reason.strerror}{where}: {then}") from None
        raise error(f"{path} cannot be written: {reason.strerror or reason}{where}") from None


def mount_point(path: Path) -> Path:
    whole = path.resolve()
    return next(p for p in (whole, *whole.parents) if p.is_mount())


@contextlib.contextmanager
def alone(lock: Path, taken: InputError) -> Iterator[None]:
    """Holds the file `lock`, created if needed and not through a link. The kernel releases it when the process ends.

    Raises:
        taken: another process holds it.
    """
    with open(os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        yield


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: at any moment, even if the machine stops, it is either the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def partial_folder(path: Path, kind: str = "partial") -> Iterator[Path]:
    """An empty hidden folder beside `path` for this process only, removed at the end. Reuses one left by a killed run.

    Raises:
        InputError: another process is writing `path`.
    """
    partial = path.parent / f".{path.name}.{kind}"
    partial.mkdir(parents=True, exist_ok=True)
    with alone(partial / LOCK, InputError(f"{path} is being written by another process; wait for it")):
        try:
            for old in partial.iterdir():
                if old.name != LOCK:
                    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
