"""Which files are read: those named, and below folders those of a known suffix. Others are listed, with the cause."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from leanseek.data.formats import DataError, format_of, pieces, read

__all__ = ["SUFFIXES", "DataError", "Inputs", "documents", "find_inputs", "input_files", "pieces", "read"]

SUFFIXES = ".txt, .jsonl, .ndjson, .json (each also .gz or .zst), .parquet"
_PEEK = 1 << 20  # of a .json found in a folder: many are no corpus


class Inputs(NamedTuple):
    """Files in the order of their paths, and what was passed over and why."""

    files: list[Path]
    skipped: list[tuple[Path, str]]


def find_inputs(inputs: list[Path], follow_links: bool = False, without: Path | None = None) -> Inputs:
    """All files among `inputs` and below folders, but for the folder `without`.

    Below a folder, hidden files and folders, links (unless `follow_links`), special files and other suffixes are
    skipped. What is named in `inputs` itself is taken as it is.

    Raises:
        DataError: an input does not exist, is no regular file, has another suffix, or nothing was found.
    """
    found: dict[Path, Path] = {}  # by where it really is: two spellings, or a link, are one file
    skipped: list[tuple[Path, str]] = []
    for path in inputs:
        if path.is_dir():
            for below in _below(path, follow_links, without, skipped):
                _once(below, found, skipped)
        elif not path.exists():
            raise DataError(f"{path} does not exist")
        elif format_of(path) is None:
            raise DataError(f"{path} is not one of {SUFFIXES}")
        elif not path.is_file():
            raise DataError(f"{path} is not a regular file")
        else:
            _once(path, found, skipped)
    if not found:
        why = f"; skipped: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise DataError(f"no {SUFFIXES} files in {', '.join(map(str, inputs))}{why}{more}")
    return Inputs(sorted(found.values()), sorted(set(skipped)))


def input_files(inputs: list[Path]) -> list[Path]:
    """The files of `find_inputs`."""
    return find_inputs(inputs).files


def documents(path: Path) -> Iterator[str]:
    """The documents of one file, in order: pieces of a text, or the `text` of each row.

    Raises:
        DataError: undecodable text, a broken row, no `text`, a truncated archive, a document beyond the limit.
    """
    return (text for text, _ in read(path))


def _once(path: Path, found: dict[Path, Path], skipped: list[tuple[Path, str]]) -> None:
    first = found.setdefault(path.resolve(), path)
    if first != path:
        skipped.append((path, f"the same file as {first}"))


def _below(folder: Path, follow_links: bool, without: Path | None, skipped: list[tuple[Path, str]]) -> Iterator[Path]:
    """The files below a folder; a loop of links is entered once."""
    waiting, entered = [folder], {folder.resolve(), *([without.resolve()] if without else [])}
    while waiting:
        here = waiting.pop()
        try:
            names = sorted(os.listdir(here))
        except OSError as error:
            skipped.append((here, f"cannot be read: {error.strerror}"))
            continue
        for path in (here / name for name in names):
            if why := _unwanted(path, follow_links):
                skipped.append((path, why))
            elif not path.is_dir():
                yield path
            elif (real := path.resolve()) not in entered:
                entered.add(real)
                waiting.append(path)
            elif path.is_symlink():
                skipped.append((path, "a link to a folder that is read already"))


def _unwanted(path: Path, follow_links: bool) -> str:
    """Why a path below a folder is not read; "" where it is."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink() and not path.exists():
        return "a broken link"
    if path.is_symlink() and not follow_links:
        return "a link; --follow-links reads it"
    if path.is_dir():
        return ""
    if not path.is_file():
        return "not a regular file"
    kind = format_of(path)
    if kind is None:
        return "another kind of file"
    if kind == ("json", "") and not _has_text(path):
        return f'a .json without "text" in its first {_PEEK >> 20} MiB'
    return ""


def _has_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return re.search(rb'"text"\s*:\s*"', file.read(_PEEK)) is not None
    except OSError:
        return True  # reading it will say why
