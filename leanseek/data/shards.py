"""Writes the folder of a prepared corpus, and reads it back with everything checked.

tokenizer.json, tokenizer_config.json    the tokenizer; a given one may add chat_template.jinja and more end tokens
token_bytes.npy                          UTF-8 bytes of each id
settings.json                            the settings it was prepared with
NNNNN.train.bin, NNNNN.validation.bin    token ids, one document after another, each with its end token
NNNNN.train.ends, NNNNN.validation.ends  int64, where each document ends in the .bin
                                         in chats, the ids that are learned have their highest bit set
NNNNN.json                               counts, checksums, and where in the input the next shard begins
manifest.json                            all of these and the tokenizer's checksums; marks the folder as complete
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from leanseek import reading
from leanseek.data.formats import DataError
from leanseek.errors import InputError
from leanseek.reading import Count, S, Structure, checked
from leanseek.writing import replace_file

SPLITS = ("train", "validation")
_CHECKED = ("tokenizer.json", "token_bytes.npy")
LEARNED = 1 << 31  # beside an id of a chat
_MOST_IDS = 1 << 24  # largest vocabulary
_BLOCK = 1 << 24  # bytes checked at a time

Crc = Annotated[int, Field(ge=0, lt=2**32)]


class Counts(Structure):
    """One split of a shard."""

    documents: Count
    tokens: Count
    bytes: Count
    crc32: Crc
    ends_crc32: Crc


class Entry(Structure):
    """A shard, as in NNNNN.json; `next` is the file and the document where the next one begins."""

    dtype: Literal["uint16", "uint32"]
    next: Annotated[list[Count], Field(min_length=2, max_length=2)]
    train: Counts
    validation: Counts


class Manifest(Structure):
    """manifest.json. Folders of the first version have no `files`."""

    files: dict[Literal["tokenizer.json", "token_bytes.npy"], Crc] = Field(default_factory=dict)
    shards: list[Entry]
    kind: Literal["text", "chat", "preference"] = "text"  # a preference is two documents: the chosen, then the rejected


class _Stamps(Structure):
    """For each file that was checked: its size, mtime, ctime, inode, checksum and largest value."""

    files: dict[str, Annotated[list[int], Field(min_length=6, max_length=6)]]


@dataclass(frozen=True)
class Prepared:
    """What a finished folder contains, and which inputs were read or skipped."""

    folder: Path
    documents: dict[str, int]
    tokens: dict[str, int]
    bytes: dict[str, int]
    files: int = 0
    skipped: tuple[tuple[Path, str], ...] = ()


def summary(folder: Path, files: int = 0, skipped: tuple[tuple[Path, str], ...] = ()) -> Prepared:
    """Totals of a finished folder. Raises DataError if it is not one."""
    shards = read_manifest(folder).shards
    totals = {
        key: {split: sum(getattr(getattr(entry, split), key) for entry in shards) for split in SPLITS}
        for key in ("documents", "tokens", "bytes")
    }
    return Prepared(folder, totals["documents"], totals["tokens"], totals["bytes"], files, skipped)


def verify(folder: Path) -> Prepared:
    """Check every byte of a finished folder. Raises DataError if anything is damaged."""
    shards = Shards(folder, anew=True)
    for number, entry in enumerate(shards.entries):
        for split in SPLITS:
            if getattr(entry, split).documents:
                shards.open(number, split)
    shards.keep_stamps()
    return summary(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder. Raises DataError if it is not one."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no finished shards; run `leanseek data prepare ... --out {folder}`")
    return read_json(path, Manifest)


def read_json(path: Path, kind: type[S]) -> S:
    """A JSON file of the folder. Raises DataError if it is damaged."""
    try:
        return checked(kind, reading.read_json(path, DataError), str(path), DataError)
    except DataError as error:
        raise DataError(f"{path} is corrupt ({error}); delete {path.parent} and run data prepare again") from None


def write_manifest(folder: Path, shards: list[Entry], kind: str = "text") -> None:
    """Mark the folder as complete."""
    files = {name: zlib.crc32((folder / name).read_bytes()) for name in _CHECKED}
    content = {"files": files, "shards": [s.model_dump() for s in shards]}
    replace_file(folder / "manifest.json", to_json(content | ({"kind": kind} if kind != "text" else {})))


def read_token_bytes(folder: Path, files: dict[Any, int]) -> np.ndarray:
    """UTF-8 bytes of each id, [ids] int64, after checking the files' checksums from the manifest.

    Raises:
        DataError: one of `files` is missing or has another checksum, or the array is not valid.
    """
    for name, crc in files.items():
        path = folder / name
        if not path.is_file() or zlib.crc32(reading.read_bytes(path, DataError)) != crc:
            raise DataError(f"{path} is missing or corrupt; delete {folder} and prepare it again")
    path = folder / "token_bytes.npy"
    try:
        sizes = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped, because its header may claim any size
        if sizes.ndim != 1 or sizes.dtype.kind != "u" or not 1 <= len(sizes) <= _MOST_IDS:
            raise ValueError
        return sizes.astype(np.int64)
    except (OSError, ValueError, EOFError, AttributeError):
        raise DataError(f"{path} is missing or corrupt; delete {folder} and prepare it again") from None


_HOLDS = {
    "text": "texts, to pre-train on; prepare chats with `leanseek data prepare --chat`",
    "chat": "chats, which `leanseek sft` trains on",
    "preference": "preferences, which `leanseek sft` trains on",
}


class Shards:
    """A finished folder, opened for reading. `anew`: check every byte, even if it was checked before.

    Opening a shard always checks sizes and that the documents tile the tokens. Its bytes (checksum, largest id) are
    checked only once: a stamp in the user's cache folder is valid as long as the file's size, times and inode stay the
    same.

    kinds: what it may hold; anything, if empty.

    Raises:
        DataError: the folder is not finished or is damaged, or holds something else.
    """

    def __init__(self, folder: Path, anew: bool = False, kinds: tuple[str, ...] = ()):
        self.folder = folder
        manifest = read_manifest(folder)
        self.kind = manifest.kind
        if kinds and self.kind not in kinds:
            raise DataError(f"{folder} holds {_HOLDS[self.kind]}")
        self.entries = manifest.shards
        self.token_bytes = read_token_bytes(folder, manifest.files)  # [ids]
        self._stamps = _read_stamps(folder) if not anew else {}
        self._stamped = dict(self._stamps)

    def open(self, number: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Memory-mapped tokens [tokens] and document ends [documents] of one split of a shard, if it has documents.

        Raises:
            DataError: a file is missing, truncated or corrupt, or holds ids that the tokenizer does not have.
        """
        entry = self.entries[number]
        counts: Counts = getattr(entry, split)
        path = self.folder / f"{number:05d}.{split}.bin"
        tokens = self._map(path, entry.dtype, counts.tokens, counts.crc32)
        ends = self._map(path.with_suffix(".ends"), "int64", counts.documents, counts.ends_crc32)
        steps = np.diff(ends, prepend=0)
        if steps.min() < 1 or ends[-1] != counts.tokens:
            raise DataError(f"shard {path.with_suffix('.ends')} is corrupt; delete {self.folder} and prepare it again")
        return tokens, ends

    def keep_stamps(self) -> None:
        """Remember what was checked. Without a writable cache folder it will be checked again."""
        if self._stamped == self._stamps:
            return
        try:
            path = _stamp_path(self.folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, to_json(self._stamped))
        except (OSError, RuntimeError):  # RuntimeError: no home
            return

    def _map(self, path: Path, dtype: str, count: int, crc: int) -> np.ndarray:
        if not path.is_file() or path.stat().st_size != count * np.dtype(dtype).itemsize or not count:
            raise DataError(f"shard {path} is missing or truncated; delete {path.parent} and prepare it again")
        array = np.memmap(path, dtype=dtype, mode="r")
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, crc]
        if (known := self._stamped.get(path.name)) is not None and known[:-1] == stamp:
            largest = known[-1]
        else:
            largest = _checked(array, crc, path, LEARNED - 1 if array.dtype == np.uint32 and self.kind != "text" else 0)
            self._stamped[path.name] = [*stamp, largest]
        if path.suffix == ".bin" and largest >= len(self.token_bytes):
            raise DataError(
                f"shard {path} holds id {largest}, the tokenizer beside it has {len(self.token_bytes)}; "
                f"delete {path.parent} and prepare it again"
            )
        return array


def _checked(array: np.ndarray, crc: int, path: Path, mask: int) -> int:
    """The largest value of a file (of its bits in `mask` if not 0), after checking that its checksum is `crc`."""
    found, largest, step = 0, 0, _BLOCK // array.itemsize
    for first in range(0, len(array), step):
        block = array[first : first + step]
        found = zlib.crc32(block, found)  # type: ignore[arg-type]  # an array is a buffer
        largest = max(largest, int((block & mask if mask else block).max()))
    if found != crc:
        raise DataError(f"shard {path} is corrupt (checksum); delete {path.parent} and prepare it again")
    return largest


def _stamp_path(folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=16).hexdigest()
    return cache / "leanseek" / "shards" / f"{name}.json"


def _read_stamps(folder: Path) -> dict[str, list[int]]:
    """The stamps of a folder; {} if they cannot be read."""
    try:
        found = {"files": reading.read_json(_stamp_path(folder))}
        return checked(_Stamps, found, "").files
    except (InputError, RuntimeError):  # RuntimeError: no home
        return {}


class ShardWriter:
    """Writes both splits of shard `number`. The shard does not count until `close`."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype):
        self.path = folder / f"{number:05d}.json"
        self.dtype = dtype
        self.splits = {split: _SplitWriter(self.path.with_suffix(f".{split}.bin")) for split in SPLITS}

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self.splits.values())

    def add(self, split: str, ids: np.ndarray, size: int) -> None:
        """Add a document: its ids including the end token, and its text's size in UTF-8 bytes."""
        self.splits[split].add(ids.astype(self.dtype, copy=False), size)

    def close(self, following: list[int]) -> Entry:
        """Sync the shard to disk; returns its manifest entry. `following`: file and document where the next begins."""
        counts = {split: writer.close() for split, writer in self.splits.items()}
        entry = Entry.model_validate({"dtype": self.dtype.name, "next": following, **counts})
        replace_file(self.path, to_json(entry.model_dump()))  # last: marks the shard as done
        return entry


class _SplitWriter:
    """Appends documents to NAME.bin, counting and computing the checksum; `close` writes their ends to NAME.ends."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.with_name(path.name + ".tmp").open("wb")
        self.ends: list[int] = []
        self.tokens = self.bytes = self.crc = 0

    def add(self, ids: np.ndarray, size: int) -> None:
        raw = ids.tobytes()
        self.file.write(raw)
        self.crc = zlib.crc32(raw, self.crc)
        self.tokens += len(ids)
        self.bytes += size
        self.ends.append(self.tokens)

    def close(self) -> dict[str, int]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        Path(self.file.name).replace(self.path)
        ends = np.array(self.ends, dtype=np.int64).tobytes()
        replace_file(self.path.with_suffix(".ends"), ends)
        counts = {"documents": len(self.ends), "tokens": self.tokens, "bytes": self.bytes}
        return counts | {"crc32": self.crc, "ends_crc32": zlib.crc32(ends)}


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()  # ASCII, because paths may contain invalid UTF-8
