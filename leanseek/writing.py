"""Files that we write: whole or not at all, by one process at a time, and in one line what the system says to that."""

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
    """What the system says to a write below `path`, in one line.

    Raises:
        RunError: the disk is full, or `ulimit -f` is reached, or the disk fails; `then` is what to do.
        error: the place cannot be written.
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
    """Nobody else holds the file `lock`, which is made if need be; the kernel lets go of it with the process.

    Raises:
        taken: somebody does.
    """
    with lock.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        yield


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is, at any instant, the old one or the new one, also when the machine stops."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def partial_folder(path: Path, kind: str = "partial") -> Iterator[Path]:
    """An empty hidden folder beside `path`, for us alone, gone at the end; one that a kill left behind is taken over.

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
