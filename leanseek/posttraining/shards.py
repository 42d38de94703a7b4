"""Rows of chats -> shards as those of texts, one document a sample, which record what is learned of it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leanseek import reading
from leanseek.data.encode import is_validation
from leanseek.data.formats import DataError
from leanseek.data.prepare import claim, digest_of, identity
from leanseek.data.shards import LEARNED, SPLITS, Entry, Prepared, ShardWriter, read_json, summary, write_manifest
from leanseek.data.tokenizer import TEMPLATE, load_tokenizer, save_tokenizer, token_bytes
from leanseek.errors import Interrupted
from leanseek.posttraining.chat import Chats, Sample
from leanseek.posttraining.preferences import pair
from leanseek.posttraining.rows import SUFFIXES, Row, read_rows
from leanseek.writing import LOCK, alone, replace_file, writing

SHARD_TOKENS = 1 << 22  # the most that a killed run repeats


@dataclass(frozen=True)
class _Settings:
    """Everything that the folder's content depends on; stored in settings.json."""

    files: list[list[Any]]
    tokenizer: str
    validation_fraction: float
    seed: int
    shard_tokens: int
    version: str = "chat 1"


class _Read(NamedTuple):
    file: int
    row: int  # rows of the file read so far, this one included
    kind: str
    validation: bool
    samples: list[Sample]
    size: int  # bytes of the row


def prepare_chats(
    inputs: list[Path],
    out: Path,
    tokenizer: Path,
    *,
    validation_fraction: float = 0.05,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    follow_links: bool = False,
) -> Prepared:
    """Turn files of rows, or folders of them, into the shard folder `out`; finished shards are kept.

    tokenizer: a folder with a tokenizer.json and perhaps a chat template, such as the model's. The template that is
    used goes along into the folder, and from there into checkpoints.

    Raises:
        DataError: a row cannot be used (the message names it), or `out` was prepared with other settings.
        InputError: the tokenizer or its template cannot be used.
        Interrupted: Ctrl-C; finished shards are kept.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"the validation fraction must lie in [0, 1), not {validation_fraction}")
    tokenizer = tokenizer if tokenizer.is_dir() else tokenizer.parent
    if not follow_links:
        reading.check_links(tokenizer, DataError, "--follow-links follows it")
    files = _files(inputs)
    settings = _Settings(
        [identity(path) for path in files], digest_of(tokenizer), validation_fraction, seed, shard_tokens
    )
    try:
        with writing(out, "make room, then run the same command again", DataError):
            out.mkdir(parents=True, exist_ok=True)
            with alone(out / LOCK, DataError(f"{out} is being prepared by another process; wait for it")):
                claim(out, settings)
                if not (out / "manifest.json").is_file():
                    _write(out, files, tokenizer, settings)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {out} keeps its finished shards; run the same command again to continue") from None
    return summary(out, len(files))


def _files(inputs: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in inputs:
        below = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES] if path.is_dir() else [path]
        if not below:
            raise DataError(f"{path} has no files of {', '.join(SUFFIXES)}")
        found += below
    if missing := next((path for path in found if not path.is_file()), None):
        raise DataError(f"{missing} does not exist, or is not a regular file")
    return found


def _write(out: Path, files: list[Path], tokenizer: Path, settings: _Settings) -> None:
    if not (out / "token_bytes.npy").is_file():
        _place_tokenizer(out, tokenizer)
    entries: list[Entry] = []
    while (done := out / f"{len(entries):05d}.json").is_file():
        entries.append(read_json(done, Entry))
    start = entries[-1].next if entries else [0, 0]
    chats, writer, kinds = Chats(out), None, set[str]()
    try:
        for read in _read(files, chats, settings, *start):
            kinds.add(read.kind)
            if len(kinds) > 1:
                raise DataError(f"{files[read.file]} row {read.row} is a {read.kind}, and rows before it are not")
            writer = writer or ShardWriter(out, len(entries), np.dtype(np.uint32))
            for sample in read.samples:
                ids = np.array(sample.ids, np.uint32) | np.array(sample.learned, np.uint32) * np.uint32(LEARNED)
                writer.add(SPLITS[read.validation], ids, read.size // len(read.samples))
            if writer.tokens >= settings.shard_tokens:
                entries.append(writer.close([read.file, read.row]))
                writer = None
    finally:
        chats.close()
    if writer:
        entries.append(writer.close([read.file, read.row]))
    if not entries:
        raise DataError("the input files have no rows")
    for path, before in zip(files, settings.files, strict=True):
        if identity(path) != before:
            raise DataError(f"{path} has changed while it was read; delete {out} and run data prepare again")
    write_manifest(out, entries, kinds.pop() if kinds else _kind(files))


def _read(files: list[Path], chats: Chats, settings: _Settings, file: int, row: int) -> Iterator[_Read]:
    """What follows the first `row` rows of files[file]."""
    for number in range(file, len(files)):
        rows = enumerate(read_rows(files[number]), start=1)
        for count, (content, place) in islice(rows, row if number == file else 0, None):
            text = json.dumps(content, ensure_ascii=False, default=str)
            held = is_validation(text, settings.validation_fraction, settings.seed)
            kind = _kind_of(content)
            samples = pair(chats, content, place) if kind == "preference" else chats.samples(content, place)
            yield _Read(number, count, kind, held, samples, len(text.encode(errors="replace")))


def _kind_of(row: Row) -> str:
    return "preference" if "chosen" in row and "rejected" in row else "chat"


def _kind(files: list[Path]) -> str:
    """Of rows that were all written before."""
    return next(_kind_of(row) for path in files for row, _ in read_rows(path))


def _place_tokenizer(out: Path, given: Path) -> None:
    """The tokenizer's files, with the template that is used. token_bytes.npy comes last: it marks them as done."""
    tokenizer = load_tokenizer(given)
    save_tokenizer(tokenizer, out, given)
    chats = Chats(out)
    source = chats.template.source
    chats.close()
    if not (out / TEMPLATE).is_file():
        (out / TEMPLATE).write_text(source, encoding="utf-8")
    content = io.BytesIO()
    np.save(content, token_bytes(tokenizer))
    replace_file(out / "token_bytes.npy", content.getvalue())
