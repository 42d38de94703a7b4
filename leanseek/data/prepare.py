"""Files -> token shards: read here, encoded by several processes, written here in order.

The shards do not depend on the number of processes, and a run that was killed at any moment goes on after its last
whole shard and ends with the same bytes: each shard records where in the input the next one begins.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from leanseek.data.files import DataError, documents, input_files, read
from leanseek.data.shards import SPLITS, Prepared, ShardWriter, summary, to_json, write_atomic, write_manifest
from leanseek.data.tokenizer import end_token, load_tokenizer, save_tokenizer, token_bytes, train_tokenizer
from leanseek.threads import cpus

SHARD_TOKENS = 1 << 24  # of both splits together: the most that a killed run has to do again
_BATCH_CHARACTERS = 1 << 18  # sent to a process at a time


@dataclass(frozen=True)
class _Settings:
    """What decides the bytes of a folder; settings.json holds it."""

    files: list[list[Any]]  # [path, size]
    tokenizer: str | None  # sha256 of the file
    train_tokenizer: int | None
    validation_fraction: float
    seed: int
    shard_tokens: int
    version: int = 2


class _Place(NamedTuple):
    """The end of a document: its file, documents of the file so far, bytes of the file read so far."""

    file: int
    document: int
    read: int


class _Encoded(NamedTuple):
    """A document: its split, its ids with the end token, the UTF-8 bytes of its text."""

    split: str
    ids: np.ndarray
    size: int


def is_validation(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation split: by its content, so that duplicates stay together."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


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
) -> Prepared:
    """Turn `inputs` into the shard folder `out`; finished work is kept.

    tokenizer: a tokenizer.json; or train_vocab: the size of one to train on the training documents.
    workers: processes that encode; one for each CPU that may be used when None. They do not change the result.

    Raises:
        DataError: unreadable input, or `out` was prepared with other settings.
    """
    if (tokenizer is None) == (train_vocab is None):
        raise DataError("give either a tokenizer file (--tokenizer) or the size of one to train (--train-tokenizer)")
    if not 0 <= validation_fraction < 1:
        raise DataError(f"the validation fraction must lie in [0, 1), not {validation_fraction}")
    if not 0 <= seed < 2**64:
        raise DataError(f"the seed must lie in [0, 2^64), not {seed}")
    files = input_files(inputs)
    sizes = [[str(path), path.stat().st_size] for path in files]
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer and tokenizer.is_file() else None
    settings = _Settings(sizes, digest, train_vocab, validation_fraction, seed, shard_tokens)
    _claim(out, settings)
    if (out / "manifest.json").is_file():
        return summary(out)
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as progress:
        if not (out / "token_bytes.npy").is_file():
            task = progress.add_task("tokenizer", total=None)
            _place_tokenizer(out, files, tokenizer, settings)
            progress.update(task, total=1, completed=1)
        entries = _write_shards(out, files, settings, workers or cpus(), progress)
    if not entries:
        raise DataError(f"there is no text in {', '.join(map(str, inputs))}")
    write_manifest(out, entries)
    return summary(out)


def _claim(out: Path, settings: _Settings) -> None:
    """Write what this folder is for, or check that it is for the same."""
    path = out / "settings.json"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_json(asdict(settings)))
        return
    before = json.loads(path.read_text())
    if changed := [key for key, value in asdict(settings).items() if before.get(key) != value]:
        raise DataError(f"{out} was prepared with another {changed[0]}; choose another --out or delete that folder")


def _place_tokenizer(out: Path, files: list[Path], given: Path | None, settings: _Settings) -> None:
    if given is not None:
        tokenizer = load_tokenizer(given)
    else:
        assert settings.train_tokenizer is not None
        fraction, seed = settings.validation_fraction, settings.seed
        texts = (t for path in files for t in documents(path) if not is_validation(t, fraction, seed))
        tokenizer = train_tokenizer(texts, settings.train_tokenizer)
    end_token(tokenizer)  # a tokenizer without one is refused before any work is done
    save_tokenizer(tokenizer, out)
    content = io.BytesIO()
    np.save(content, token_bytes(tokenizer))
    write_atomic(out / "token_bytes.npy", content.getvalue())  # last: marks the tokenizer as done


def _write_shards(
    out: Path, files: list[Path], settings: _Settings, workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; returns the entries of all."""
    entries: list[dict[str, Any]] = []
    while (done := out / f"{len(entries):05d}.json").is_file():
        entries.append(json.loads(done.read_text()))
    start = entries[-1]["next"] if entries else [0, 0]
    before = np.cumsum([0, *(size for _, size in settings.files)])
    task = progress.add_task("shards", total=int(before[-1]), completed=int(before[start[0]]))
    ids = len(np.load(out / "token_bytes.npy", allow_pickle=False))
    dtype = np.dtype(np.uint16 if ids <= 2**16 else np.uint32)
    writer, place = None, _Place(start[0], start[1], 0)
    for places, encoded in _encode_all(out, _batches(files, *start), settings, workers):
        for place, document in zip(places, encoded, strict=True):
            writer = writer or ShardWriter(out, len(entries), dtype)
            writer.add(*document)
            if writer.tokens >= settings.shard_tokens:
                entries.append(writer.close([place.file, place.document]))
                writer = None
        progress.update(task, completed=int(before[place.file]) + place.read)
    if writer:
        entries.append(writer.close([place.file, place.document]))
    progress.update(task, completed=int(before[-1]))
    return entries


def _batches(files: list[Path], file: int, document: int) -> Iterator[tuple[list[_Place], list[str]]]:
    """The documents after the first `document` of files[file], some at a time."""
    places: list[_Place] = []
    texts: list[str] = []
    size = 0
    for number in range(file, len(files)):
        numbered = enumerate(read(files[number]), start=1)
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


def _encode_all(
    out: Path, batches: Iterator[tuple[list[_Place], list[str]]], settings: _Settings, workers: int
) -> Iterator[tuple[list[_Place], list[_Encoded]]]:
    """The batches through the processes and back in order, a few read ahead."""
    waiting: deque[tuple[list[_Place], Future[list[_Encoded]]]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for places, texts in batches:
            job = pool.submit(_encode, out, texts, settings.validation_fraction, settings.seed)
            waiting.append((places, job))
            if len(waiting) > 2 * workers:
                places, job = waiting.popleft()
                yield places, job.result()
        for places, job in waiting:
            yield places, job.result()


def _encode(folder: Path, texts: list[str], fraction: float, seed: int) -> list[_Encoded]:
    """Runs in a worker process."""
    tokenizer, end = _encoder(folder)
    return [
        _Encoded(SPLITS[is_validation(text, fraction, seed)], np.array([*e.ids, end], np.uint32), len(text.encode()))
        for text, e in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True)
    ]


@cache  # one a worker process
def _encoder(folder: Path) -> tuple[Tokenizer, int]:
    """The tokenizer for raw text, in which the name of a special token is text and never that token; its end token."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = load_tokenizer(folder)
    tokenizer.encode_special_tokens = True
    return tokenizer, end_token(tokenizer)
