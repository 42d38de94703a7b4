"""Reads files that somebody else wrote: regular files only, with size limits, as UTF-8, into a declared structure.

Errors are one line that names the file, the key, the value found and the value expected.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leanseek.errors import InputError

LARGEST = 128 * 2**20  # most bytes of a text: an index of 90,000 tensors takes 9 MB, a tokenizer.json 8 to 20
SHOWN = 60  # most characters of a value in a message
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # a surrogate in JSON

Count = Annotated[int, Field(ge=0, le=2**40)]
TokenId = Annotated[int, Field(ge=0, le=2**24)]


class Structure(BaseModel):
    """What a kind of file must contain: strict types and finite numbers. Keys that we do not read are ignored."""

    # no namespace is protected: pydantic below 2.10 warns of a field `model_type`
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", frozen=True, protected_namespaces=())


S = TypeVar("S", bound=BaseModel)


def open_regular(path: Path, error: type[InputError] = InputError) -> tuple[BinaryIO, int]:
    """Opens a regular file for reading, following links; returns it and its size.

    Raises:
        error: it is missing, not a regular file (a pipe would block forever), or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the name
        raise error(f"{path}: {getattr(reason, 'strerror', None) or reason}") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise error(f"{path} is not a regular file")
    return open(handle, "rb"), found.st_size


def read_bytes(path: Path, error: type[InputError] = InputError, limit: int = LARGEST) -> bytes:
    """The content of a regular file, following links.

    Raises:
        error: as in `open_regular`, or the file is too large.
    """
    file, size = open_regular(path, error)
    with file:
        if size > limit:
            raise error(f"{path} has {size:,} bytes; such a file has at most {limit:,}")
        try:
            return file.read(size)
        except OSError as reason:
            raise error(f"{path}: {reason.strerror}") from None


def read_text(path: Path, error: type[InputError] = InputError, limit: int = LARGEST) -> str:
    """Like `read_bytes`, decoded as UTF-8 in every locale; a byte order mark is dropped.

    Raises:
        error: as in `read_bytes`, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, error, limit).decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 at byte {reason.start}") from None


def read_json(path: Path, error: type[InputError] = InputError, limit: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: as in `read_bytes`; or it is not UTF-8, not a JSON object, too deep, or has NaN or infinite numbers.
    """
    return parse_json(read_bytes(path, error, limit), str(path), error)


def read_optional_json(path: Path, error: type[InputError] = InputError, limit: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no such file. A broken link is an error.

    Raises:
        error: as in `read_json`.
    """
    return read_json(path, error, limit) if os.path.lexists(path) else {}


def parse_json(text: str | bytes, where: str, error: type[InputError] = InputError) -> dict[str, Any]:
    """The JSON object in a text. Keys must be unique and strings valid Unicode.

    Raises:
        error: as in `read_json`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise error(f"{where} cannot be read as JSON: its brackets are nested too deeply") from None
    except UnicodeDecodeError as reason:
        raise error(f"{where} is not valid JSON: it is not UTF-8 at byte {reason.start}") from None
    except UnicodeEncodeError:
        raise error(f"{where} is not valid JSON: it holds half a surrogate pair") from None
    except ValueError as reason:
        raise error(f"{where} is not valid JSON ({shorten(str(reason))})") from None
    if not isinstance(value, dict):
        raise error(f"{where} must hold a JSON object")
    return value


def read_toml(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        error: as in `read_text`, or the file is not TOML.
    """
    return parse_toml(read_text(path, error), str(path), error)


def parse_toml(text: str, where: str, error: type[InputError] = InputError) -> dict[str, Any]:
    """The tables in a TOML text.

    Raises:
        error: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise error(f"{where} cannot be read as TOML: its brackets are nested too deeply") from None
    except ValueError as reason:
        raise error(f"{where}: {shorten(str(reason), 200)}") from None


def checked(structure: type[S], value: Mapping[str, Any], where: str, error: type[InputError] = InputError) -> S:
    """`value`, checked against the structure.

    Raises:
        error: a key is missing, has the wrong type or is out of bounds.
    """
    try:
        return structure.model_validate(dict(value))
    except ValidationError as reason:
        found = reason.errors(include_url=False)[0]
        key = ".".join(str(part) for part in found["loc"]) or "it"
        if found["type"] == "missing":
            raise error(f"{where} has no {key}") from None
        if found["type"] == "extra_forbidden":
            raise error(f"{where} has no key {key!r}") from None
        rule = found["msg"].removeprefix("Value error, ").replace("Input should", "should")
        raise error(f"{where}: {shorten(key)} = {shorten(repr(found['input']))} {rule}") from None


MODEL_FILES = (".safetensors", ".json", ".jinja", ".model")  # the files that we read in a model's folder
FOLLOW = "allow_links=True or --allow-links follows it"


def leaves(path: Path, folder: Path) -> Path | None:
    """The real path of a file below `folder` if links lead outside; else None.

    Inside means within the resolved folder (a Kubernetes volume's `..data`) or, if the folder is a snapshot in a Hub
    cache, within the repository's blobs, wherever they are.
    """
    home, target = folder.resolve(), path.resolve()
    snapshots = [place for place in (home, folder.absolute()) if place.parent.name == "snapshots"]
    homes = [home, *((place.parent.parent / "blobs").resolve() for place in snapshots)]
    return None if any(target.is_relative_to(place) for place in homes) else target


def check_links(folder: Path, error: type[InputError] = InputError, mend: str = FOLLOW) -> None:
    """Checks that no file that we read in a model's folder is a link to the outside, which would expose its content.

    Raises:
        error: one is; the message names it and says how to allow it.
    """
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if entry.is_symlink())
    except OSError as reason:
        raise error(f"{folder}: {reason.strerror}") from None
    for name in entries:
        if name.endswith(MODEL_FILES) and (target := leaves(folder / name, folder)) is not None:
            raise error(f"{folder / name} is a link to {target}, which leaves its folder; {mend}")


def shorten(text: str, most: int = SHOWN) -> str:
    """One printable line of at most `most` characters."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text)} is too large for a number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shorten(name)!r} appears twice")
    return found
