"""Documents out of one file's bytes, as a stream: text, JSON lines, JSON, each plain or compressed, and parquet."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from leanseek.errors import InputError
from leanseek.reading import shorten

# A book in one .txt would land whole in the training or the validation split. Longer texts are cut into documents of
# about this many characters, and never more than twice as many.
PIECE_CHARACTERS = 32_768
MAX_DOCUMENT = 64  # MiB of a row, or of a text's line: a small archive may hold a line that fills the memory

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_SPACE, _BETWEEN_ROWS = re.compile(r"\s*"), re.compile(r"[\s,]*")
_CHUNK = 1 << 20  # bytes read at a time
_WIDE = ((codecs.BOM_UTF32_LE, 32), (codecs.BOM_UTF32_BE, 32), (codecs.BOM_UTF16_LE, 16), (codecs.BOM_UTF16_BE, 16))


class DataError(InputError):
    """Input data that cannot be read; the message names the file and the place."""


Document = tuple[str, int]  # its text, and the bytes of the file read by then


def read(path: Path, max_document: int = MAX_DOCUMENT) -> Iterator[Document]:
    """The documents of a file in order, by its suffix: pieces of a text, or the `text` of each row.

    Raises:
        DataError: undecodable text, a broken row, no `text`, a truncated archive, more than `max_document` MiB.
    """
    kind, packing = format_of(path) or ("", "")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file")
    limit = max_document << 20
    try:
        if kind == "parquet":
            yield from _parquet(path, limit)
            return
        with path.open("rb") as file, _decompressed(file, packing) as raw:
            for text in _READERS[kind](_bytes(raw, path), path, limit):
                yield text, file.tell()
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is truncated or cannot be read ({error}); replace it or leave it out") from None


def format_of(path: Path) -> tuple[str, str] | None:
    """("text", "gz") and so on, by the file's name in any case; None where it is not one that is read."""
    found = re.fullmatch(r".*\.(txt|jsonl|ndjson|json|parquet)(?:\.(gz|zst))?", path.name.lower(), re.DOTALL)
    if found is None or (found[1] == "parquet" and found[2]):
        return None
    return {"txt": "text", "jsonl": "lines", "ndjson": "lines"}.get(found[1], found[1]), found[2] or ""


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The text that `chunks` make together, cut into documents; nothing is dropped.

    A cut comes after the first blank line past PIECE_CHARACTERS; without one before twice as many, after a line; in a
    text without lines, anywhere. Where the chunks end makes no difference.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        start = 0
        while len(text) - start > 2 * PIECE_CHARACTERS:
            end = _cut(text, start)
            yield text[start:end]
            start = end
        text = text[start:]
    while text:
        end = _cut(text, 0)
        yield text[:end]
        text = text[end:]


def _cut(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends."""
    least, most = start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS
    if blank := _BLANK_LINES.search(text, least, most):
        return blank.end()
    if len(text) <= most:
        return len(text)
    return text.find("\n", least, most) + 1 or most


# ---- bytes ----


def _decompressed(file: BinaryIO, packing: str) -> BinaryIO | io.BufferedIOBase:
    if packing == "gz":
        return gzip.GzipFile(fileobj=file)
    if packing == "zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    return file


def _bytes(file: BinaryIO | io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    """The file in chunks, without a UTF-8 byte order mark; what is plainly not UTF-8 text is refused by name."""
    chunk = file.read(_CHUNK)
    for mark, bits in _WIDE:
        if chunk.startswith(mark):
            raise DataError(f"{path} is UTF-{bits} (its first bytes say so); convert it: iconv -f UTF-{bits} -t UTF-8")
    if chunk.count(0) * 10 > len(chunk):
        raise DataError(f"{path} is not text: many of its bytes are zero (UTF-16 without a mark looks so too)")
    chunk = chunk.removeprefix(codecs.BOM_UTF8)
    while chunk:
        yield chunk
        chunk = file.read(_CHUNK)


def _bounded(chunks: Iterable[bytes], path: Path, limit: int, lines: bool = True) -> Iterator[bytes]:
    """The same chunks. Raises DataError at a run of blanks, or with `lines` at a line, of more than `limit` bytes."""
    line = blank = 0
    for chunk in chunks:
        newline = chunk.rfind(b"\n")
        line = line + len(chunk) if newline < 0 else len(chunk) - newline - 1
        blank = blank + len(chunk) if chunk.isspace() else 0
        if lines and line > limit:
            raise _too_long(f"{path} has a line with", limit)
        if blank > limit:
            raise DataError(f"{path} has more than {limit >> 20} MiB of blanks in a row; leave it out")
        yield chunk


def _too_long(what: str, limit: int) -> DataError:
    return DataError(f"{what} more than {limit >> 20} MiB; raise --max-document or leave it out")


def _decoded(chunks: Iterable[bytes], path: Path) -> Iterator[str]:
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for chunk in chunks:
            yield decoder.decode(chunk)
            place += len(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:  # decoded together with the bytes that the last chunk left over
        raise _not_utf8(path, place - len(decoder.getstate()[0]) + error.start) from None


def _not_utf8(place: object, byte: int) -> DataError:
    return DataError(f"{place} is not UTF-8 at byte {byte}; convert it, for example with iconv")


# ---- the kinds ----


def _text(chunks: Iterable[bytes], path: Path, limit: int) -> Iterator[str]:
    return pieces(_decoded(_bounded(chunks, path, limit), path))


def _json_lines(chunks: Iterable[bytes], path: Path, limit: int) -> Iterator[str]:
    number, held = 1, bytearray()
    for chunk in _bounded(chunks, path, limit):
        if not held and chunk.isspace():
            number += chunk.count(b"\n")
            continue
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            if held:
                held += line
                line, held = bytes(held), bytearray()
            if line and not line.isspace():
                yield _row(line, f"{path}:{number}", limit)
            number += 1
        held += rest
    if held.strip():
        yield _row(bytes(held), f"{path}:{number}", limit)


def _row(line: bytes, place: str, limit: int) -> str:
    try:
        text = line.decode().removeprefix("\ufeff")  # files put together, each with its mark
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error.start) from None
    try:
        return _row_text(json.loads(text), place, limit)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error.msg} at column {error.colno}") from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{place} is not JSON that can be read: {error}") from None


def _json(chunks: Iterable[bytes], path: Path, limit: int) -> Iterator[str]:
    """A .json: an array of rows, one row, or rows one after the other, which many call .json too."""
    source, decoder = _decoded(_bounded(chunks, path, limit, lines=False), path), json.JSONDecoder()
    text, at, number, array, ended = "", 0, 0, False, False
    while True:
        gap = (_BETWEEN_ROWS if array else _SPACE).match(text, at)
        at = gap.end() if gap else at
        if at < len(text) and text[at] == "[" and not number and not array:
            array, at = True, at + 1
            continue
        if array and text[at : at + 1] == "]":
            array, at = False, at + 1
            continue
        if at < len(text):
            try:
                row, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                if ended:
                    raise DataError(f"{path} row {number + 1} is not JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} row {number + 1} is not JSON that can be read: {error}") from None
            else:
                number += 1
                yield _row_text(row, f"{path} row {number}", limit)
                continue
        if ended:
            if array:
                raise DataError(f"{path} ends within its array; replace it or leave it out")
            return
        if len(text) - at > limit:
            raise _too_long(f"{path} row {number + 1} has", limit)
        more, wanted = [], len(text) - at  # twice as much, so that a long row is not parsed again and again
        while wanted >= 0 and not ended:
            chunk = next(source, None)
            ended = chunk is None
            more.append(chunk or "")
            wanted -= len(chunk or "")
        text, at = text[at:] + "".join(more), 0


def _row_text(row: object, place: str, limit: int) -> str:
    return _checked(row.get("text") if isinstance(row, dict) else None, place, limit)


def _checked(text: object, place: str, limit: int) -> str:
    if not isinstance(text, str):
        raise DataError(f"{place} has no string 'text'; leave such rows out")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise DataError(f"{place} has half a surrogate pair at character {error.start}; leave the row out") from None
    if size > limit:
        raise _too_long(f"{place} has", limit)
    return text


_READERS: dict[str, Callable[[Iterable[bytes], Path, int], Iterator[str]]] = {
    "text": _text,
    "lines": _json_lines,
    "json": _json,
}


def _parquet(path: Path, limit: int) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    strings = (pyarrow.StringScalar, pyarrow.LargeStringScalar)
    try:
        # opened here: a path goes to pyarrow in UTF-8, whatever bytes name the file
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file, buffer_size=_CHUNK) as table:
            if "text" not in table.schema_arrow.names:
                raise DataError(
                    f"{path} has no column 'text' (it has {shorten(', '.join(table.schema_arrow.names), 300)})"
                )
            column = table.schema.names.index("text") if "text" in table.schema.names else None
            for number in range(table.num_row_groups):
                group = table.metadata.row_group(number)
                most = limit * group.num_rows + _CHUNK  # and the headers of its pages
                if column is not None and group.column(column).total_uncompressed_size > most:
                    raise _too_long(f"{path}, row group {number}, has rows with", limit)
            size, rows, row = path.stat().st_size, table.metadata.num_rows, 0
            for batch in table.iter_batches(batch_size=16, columns=["text"]):  # few: a dictionary repeats a long one
                for scalar in batch.column(0):
                    row += 1
                    if isinstance(scalar, strings) and scalar.is_valid and len(scalar.as_buffer()) > limit:
                        raise _too_long(f"{path} row {row} has", limit)
                    yield _checked(scalar.as_py(), f"{path} row {row}", limit), size * row // rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]})") from None
