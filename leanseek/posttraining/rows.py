"""Rows of JSON lines or parquet, one at a time, each with its place for messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leanseek.data.formats import DataError
from leanseek.reading import parse_json

Row = dict[str, Any]
LARGEST = 1 << 26  # bytes of a line
SUFFIXES = (".jsonl", ".ndjson", ".parquet")


def read_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """The rows of a file and where each is: "chats.jsonl:7", "chats.parquet row 7".

    Raises:
        DataError: the file is neither, or cannot be read; or a row is not an object.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} is not one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is not a regular file")
    return _parquet(path) if path.suffix.lower() == ".parquet" else _lines(path)


def _lines(path: Path) -> Iterator[tuple[Row, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST + 1), b""), 1):
            if len(line) > LARGEST:
                raise DataError(f"{path}:{number} has more than {LARGEST >> 20} MiB")
            if not line.isspace():
                yield parse_json(line, f"{path}:{number}", DataError), f"{path}:{number}"


def _parquet(path: Path) -> Iterator[tuple[Row, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            rows = (row for batch in table.iter_batches(batch_size=64) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield row, f"{path} row {number}"
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]})") from None
