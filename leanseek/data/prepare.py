"""Files -> token shards: read and written in order by this process, encoded by several others.

The shards do not depend on the number of processes. Each shard records where in the input the next one begins, so a run
that was killed continues after its last finished shard and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from leanseek import reading
from leanseek.data.encode import Encoded, Encoders, digest, is_validation
from leanseek.data.files import find_inputs
from leanseek.data.formats import MAX_DOCUMENT, DataError, read
from leanseek.data.shards import (
    SPLITS,
    Entry,
    Prepared,
    ShardWriter,
    read_json,
    read_token_bytes,
    summary,
    to_json,
    write_manifest,
)
from leanseek.data.tokenizer import (
    TOKENIZER_FILES,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_files,
    train_tokenizer,
)
from leanseek.errors import Interrupted
from leanseek.machine.threads import cpus
from leanseek.reading import shorten
from leanseek.writing import LOCK, alone, replace_file, writing

__all__ = ["claim", "digest_of", "identity", "is_validation", "prepare"]

SHARD_TOKENS = 1 << 24  # of both splits together: the most that a killed run repeats
_BATCH_CHARACTERS = 1 << 18  # sent to a process at a time
_AHEAD_CHARACTERS = 1 << 27  # most characters read ahead, besides the batch of each process
_SAY_EVERY = 30  # seconds between progress lines when there is no terminal for a bar


@dataclass(frozen=True)
class _Settings:
    """Everything that the folder's content depends on; stored in settings.json."""

    files: list[list[Any]]  # [path, size, mtime in ns]
    tokenizer: str | None  # sha256 of its files
    train_tokenizer: int | None
    validation_fraction: float
    seed: int
    shard_tokens: int
    version: int = 3


class _Source(NamedTuple):
    """The input files, the validation share (see `_share`), and a document's limit in MiB."""

    files: list[Path]
    share: float
    seed: int
    max_document: int

    def documents(self) -> Iterator[str]:
        return (text for path in self.files for text, _ in read(path, self.max_document) if text)


class _Place(NamedTuple):
    """The end of a document: its file, the documents so far in this file, and the bytes read so far."""

    file: int
    document: int
    read: int


def prepare(
    inputs: list[Path],
    out: Path,
    *,
    tokenizer: Path | None = None,
    train_vocab: int | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    follow_links: bool = False,
    max_document: int = MAX_DOCUMENT,
) -> Prepared:
    """Turn `inputs` into the shard folder `out`; finished work is kept.

    tokenizer: a tokenizer.json, or its folder; or train_vocab: the size of one to train on the training documents.
    workers: number of encoding processes; None: one per CPU that we may use. It does not change the result.
    follow_links: follow links below input folders and in the tokenizer's folder.
    max_document: the largest document allowed, in MiB.

    Raises:
        DataError: an input is unreadable, or `out` is unusable or was prepared with other settings.
        RunError: the disk is full, or a process died; finished shards are kept.
        Interrupted: Ctrl-C; finished shards are kept.
    """
    if (tokenizer is None) == (train_vocab is None):
        raise DataError("give either a tokenizer file (--tokenizer) or the size of one to train (--train-tokenizer)")
    if not 0 <= validation_fraction < 1:
        raise DataError(f"the validation fraction must lie in [0, 1), not {validation_fraction}")
    if not 0 <= seed < 2**64:
        raise DataError(f"the seed must lie in [0, 2^64), not {seed}")
    if workers is not None and not 1 <= workers <= 1024:
        raise DataError(f"workers must lie between 1 and 1024, not {workers}")
    if not 1 <= max_document <= 1 << 11:
        raise DataError(f"the limit of a document must lie between 1 and 2048 MiB, not {max_document}")
    if tokenizer is not None and tokenizer.is_dir() and not follow_links:
        reading.check_links(tokenizer, DataError, "--follow-links follows it")
    found = find_inputs(inputs, follow_links, without=out)
    settings = _Settings(
        [identity(path) for path in found.files],
        None if tokenizer is None else digest_of(tokenizer),
        train_vocab,
        validation_fraction,
        seed,
        shard_tokens,
    )
    try:
        with writing(out, "make room, then run the same command again", DataError):
            if (out / "manifest.json").is_file():
                claim(out, settings)
            else:
                out.mkdir(parents=True, exist_ok=True)
                with alone(out / LOCK, DataError(f"{out} is being prepared by another process; wait for it")):
                    claim(out, settings)
                    share = _share(found.files, validation_fraction, seed, max_document)
                    source = _Source(found.files, share, seed, max_document)
                    _write(out, source, settings, tokenizer, workers or cpus())
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {out} keeps its finished shards; run the same command again to continue") from None
    return summary(out, len(found.files), tuple(found.skipped))


def identity(path: Path) -> list[Any]:
    """A file's name, size and time of change, by which settings know it."""
    status = path.stat()
    name = os.fsencode(path).decode("utf-8", "backslashreplace")  # the same in every locale, and valid in JSON
    return [name, status.st_size, status.st_mtime_ns]


def digest_of(tokenizer: Path) -> str:
    """sha256 of a tokenizer's files."""
    whole = hashlib.sha256()
    for path in tokenizer_files(tokenizer):
        if not path.is_file():
            raise DataError(f"no tokenizer at {path}")
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def claim(out: Path, settings: Any) -> None:
    """Write the settings, a dataclass, to the folder, or check that they match. Until its first shard a folder may
    change settings.

    Raises:
        DataError: it holds other files, or shards with other settings.
    """
    path = out / "settings.json"
    if not path.is_file():
        if other := sorted(p.name for p in out.iterdir() if not p.name.startswith(".")):
            raise DataError(f"{out} holds {shorten(other[0])}, which data prepare did not write; choose another --out")
        replace_file(path, to_json(asdict(settings)))
        return
    try:
        before = reading.read_json(path, DataError)
    except DataError as error:
        raise DataError(f"{path} is corrupt ({error}); delete {out} and run data prepare again") from None
    changed = [key for key, value in asdict(settings).items() if before.get(key) != value]
    if not changed:
        return
    if not any((out / name).exists() for name in ("00000.json", "manifest.json")):  # for example, an input was fixed
        for name in TOKENIZER_FILES:
            (out / name).unlink(missing_ok=True)
        replace_file(path, to_json(asdict(settings)))
        return
    mend = "choose another --out or delete that folder"
    if "version" in changed:
        raise DataError(f"{out} was prepared by another version of leanseek; {mend}")
    if changed[0] == "files":
        raise DataError(f"{_changed_file(before['files'], settings.files)} since {out} was prepared; {mend}")
    raise DataError(f"{out} was prepared with another {changed[0]}; {mend}")


def _changed_file(before: object, now: list[list[Any]]) -> str:
    """The first file that differs, and how."""
    was = {str(file[0]): file for file in before if isinstance(file, list) and file} if isinstance(before, list) else {}
    for file in now:
        if file[0] not in was:
            return f"{file[0]} was added"
        if file != was.pop(file[0]):
            return f"{file[0]} has changed (its size, or when it was written)"
    return f"{next(iter(was), 'the order of the files')} was removed"


def _share(files: list[Path], fraction: float, seed: int, max_document: int) -> float:
    """The fraction, changed as little as needed to give each split a document, if there are two different ones.

    Stops reading once both splits have one, after about 1 / fraction documents.
    """
    if not fraction:
        return fraction
    least, most = 2**64, -1
    for text in _Source(files, fraction, seed, max_document).documents():
        value = digest(text, seed)
        least, most = min(least, value), max(most, value)
        if least < fraction * 2**64 <= most:
            return fraction
    if most < 0:
        return fraction
    if least == most:  # a single document is for training
        return 0.0
    # a float just past the integer: only values below share * 2^64 are held out
    return math.nextafter(least / 2**64, 1.0) if least >= fraction * 2**64 else math.nextafter(most / 2**64, 0.0)


def _write(out: Path, source: _Source, settings: _Settings, tokenizer: Path | None, workers: int) -> None:
    console = Console(stderr=True)  # without a terminal, _write_shards prints lines instead of a bar
    with Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal) as progress:
        if not (out / "token_bytes.npy").is_file():
            task = progress.add_task("tokenizer", total=None)
            _place_tokenizer(out, source, tokenizer, settings)
            progress.update(task, total=1, completed=1)
        entries = _write_shards(out, source, settings, workers, progress)
    if not entries:
        raise DataError("the input files contain no text")
    for path, before in zip(source.files, settings.files, strict=True):
        if identity(path) != before:
            raise DataError(f"{path} has changed while it was read; delete {out} and run data prepare again")
    write_manifest(out, entries)


def _place_tokenizer(out: Path, source: _Source, given: Path | None, settings: _Settings) -> None:
    if given is not None:
        tokenizer = load_tokenizer(given)
    else:
        assert settings.train_tokenizer is not None
        texts = (text for text in source.documents() if not is_validation(text, source.share, source.seed))
        tokenizer = train_tokenizer(texts, settings.train_tokenizer)
    save_tokenizer(tokenizer, out, given)  # refuses a tokenizer without an end token before any work is done
    content = io.BytesIO()
    np.save(content, token_bytes(tokenizer))
    replace_file(out / "token_bytes.npy", content.getvalue())  # last: marks the tokenizer as done


def _write_shards(out: Path, source: _Source, settings: _Settings, workers: int, progress: Progress) -> list[Entry]:
    """Write the missing shards; returns the entries of all shards."""
    entries: list[Entry] = []
    while (done := out / f"{len(entries):05d}.json").is_file():
        entries.append(read_json(done, Entry))
    start = entries[-1].next if entries else [0, 0]
    if start[0] >= len(source.files):
        raise DataError(f"{out / f'{len(entries) - 1:05d}.json'} is corrupt; delete {out} and run data prepare again")
    before = np.cumsum([0, *(size for _, size, _ in settings.files)])
    task = progress.add_task("shards", total=int(before[-1]), completed=int(before[start[0]]))
    dtype = np.dtype(np.uint16 if len(read_token_bytes(out, {})) <= 2**16 else np.uint32)
    writer, place, said = None, _Place(start[0], start[1], 0), time.monotonic()
    with Encoders(workers, out, source.share, source.seed) as encoders:
        for places, encoded in _in_order(encoders, _batches(source, *start), 2 * workers):
            for place, document in zip(places, encoded, strict=True):
                writer = writer or ShardWriter(out, len(entries), dtype)
                writer.add(SPLITS[document.validation], document.ids, document.size)
                if writer.tokens >= settings.shard_tokens:
                    entries.append(writer.close([place.file, place.document]))
                    writer = None
            read_by_now = int(before[place.file]) + place.read
            progress.update(task, completed=read_by_now)
            if not progress.console.is_terminal and time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                print(f"shards: {read_by_now / max(int(before[-1]), 1):.0%} of the input read", file=sys.stderr)
    if writer:
        entries.append(writer.close([place.file, place.document]))
    progress.update(task, completed=int(before[-1]))
    return entries


def _batches(source: _Source, file: int, document: int) -> Iterator[tuple[list[_Place], list[str]]]:
    """Batches of the documents that follow the first `document` ones of files[file]."""
    places: list[_Place] = []
    texts: list[str] = []
    size = 0
    for number in range(file, len(source.files)):
        numbered = enumerate(read(source.files[number], source.max_document), start=1)
        for count, (text, position) in islice(numbered, document if number == file else 0, None):
            if text:
                places.append(_Place(number, count, position))
                texts.append(text)
                size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield places, texts
                places, texts, size = [], [], 0
    if texts:
        yield places, texts


def _in_order(
    encoders: Encoders, batches: Iterator[tuple[list[_Place], list[str]]], ahead: int
) -> Iterator[tuple[list[_Place], list[Encoded]]]:
    """Encodes batches in the processes and yields them in order, reading a few ahead."""
    waiting: deque[tuple[list[_Place], int, Future[list[Encoded]]]] = deque()
    size = 0
    for places, texts in batches:
        length = sum(map(len, texts))
        waiting.append((places, length, encoders.submit(texts)))
        size += length
        while len(waiting) > ahead or size > _AHEAD_CHARACTERS:
            places, length, job = waiting.popleft()
            size -= length
            yield places, job.result()
    for places, _, job in waiting:
        yield places, job.result()
