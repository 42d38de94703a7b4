"""Reads safetensors folders in pieces, checking every offset, and writes them streamed, sharded and atomically."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from leanseek import reading
from leanseek.checkpoint.names import STACKED
from leanseek.errors import InputError
from leanseek.reading import open_regular, parse_json, shorten
from leanseek.writing import LOCK, partial_folder, writing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MTP_FILE = "mtp.safetensors"  # MTP layers, if the folder's index may not name them: see `hf.save`
LARGEST_HEADER = 100_000_000  # bytes, the safetensors library's own limit
MOST_DIMENSIONS = 8
CHUNK = 8 * 2**20  # values converted at a time, the most in memory besides the weights


class CheckpointError(InputError):
    """A checkpoint that cannot be read or written; the message is one line that names the file or tensor."""


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Stored(NamedTuple):
    """A tensor in an open file. It takes no memory until it is read."""

    file: BinaryIO
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """A copy in memory."""
        return self.copy_to(torch.empty(self.shape, dtype=self.dtype))

    def copy_to(self, out: Tensor) -> Tensor:
        """Fill contiguous `out`, converting to its dtype and device.

        Raises:
            CheckpointError: the file cannot be read or has become shorter.
        """
        flat = out.view(-1)
        if out.dtype == self.dtype and out.device.type == "cpu":
            self._read_into(flat, self.start)
            return out
        buffer = torch.empty(min(CHUNK, flat.numel()), dtype=self.dtype)
        for first in range(0, flat.numel(), CHUNK):
            count = min(CHUNK, flat.numel() - first)
            self._read_into(buffer[:count], self.start + first * self.dtype.itemsize)
            flat[first : first + count].copy_(buffer[:count])
        return out

    def _read_into(self, flat: Tensor, offset: int) -> None:
        """Fill `flat`, of our dtype, from a byte offset. Reads, because a mapping would fault pages in one by one."""
        left = memoryview(flat.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
        while left:
            try:
                count = os.preadv(self.file.fileno(), [left], offset)
            except OSError as error:
                raise CheckpointError(f"{self.file.name}: {error.strerror}") from None
            if not count:
                raise CheckpointError(f"{self.file.name} ends before byte {offset + len(left)}; copy it again")
            left, offset = left[count:], offset + count

    def flat(self, start: int, stop: int) -> Stored:
        """Values `start` to `stop` of the flat tensor."""
        return self._replace(shape=(stop - start,), start=self.start + start * self.dtype.itemsize)

    def chunk(self, count: int) -> list[Stored]:
        """`count` equal parts along the first dimension, like torch.chunk."""
        rows = self.shape[0] // count
        size = rows * math.prod(self.shape[1:]) * self.dtype.itemsize
        return [self._replace(shape=(rows, *self.shape[1:]), start=self.start + i * size) for i in range(count)]


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, not read yet. They must tile the file, without gaps or overlaps.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt, or has an unknown dtype.
    """
    return open_described(path)[0]


def open_described(path: Path) -> tuple[dict[str, Stored], Any]:
    """Like `open_file`, with the metadata in the file's header; None where it has none."""
    file, size = open_regular(path, CheckpointError)  # closed when its last tensor is gone
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > size - 8:
        raise CheckpointError(f"{path} is truncated or no safetensors file: its header does not fit in {size} bytes")
    if length > LARGEST_HEADER:
        raise CheckpointError(f"{path} has a header of {length:,} bytes; one has at most {LARGEST_HEADER:,}")
    header = parse_json(file.read(length), f"{path} is corrupt: its safetensors header", CheckpointError)
    metadata = header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, file, 8 + length, size) for name, entry in header.items()}
    at = 0
    for name, (start, stop) in sorted(((n, entry["data_offsets"]) for n, entry in header.items()), key=itemgetter(1)):
        if start != at:
            how = "shares bytes with" if start < at else "leaves a gap behind"
            raise CheckpointError(f"{path} is corrupt: {shorten(name)} {how} the tensor before it")
        at = stop
    if 8 + length + at != size:
        raise CheckpointError(f"{path} is corrupt: {size - 8 - length - at} bytes at its end belong to no tensor")
    return tensors, metadata


def _stored(path: Path, name: str, entry: Any, file: BinaryIO, data: int, size: int) -> Stored:
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sizes = (start, stop, *shape)
        sound = (
            {*map(type, sizes)} == {int} and min(sizes) >= 0 and max(sizes) < 2**48 and len(shape) <= MOST_DIMENSIONS
        )
        dtype = _DTYPES.get(code)
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{path} is corrupt: {shorten(name)} in its header is {shorten(str(entry))}, not dtype, shape and "
            "data_offsets in whole numbers"
        )
    if dtype is None:
        raise CheckpointError(f"{path}: {shorten(name)} has dtype {shorten(str(code))}, which is not supported")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path} is corrupt: {shorten(name)} has offsets that do not fit its shape")
    if data + stop > size:
        raise CheckpointError(
            f"{path} is truncated: {shorten(name)} ends at byte {data + stop}, the file has {size}; copy it again"
        )
    return Stored(file, dtype, shape, data + start)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: no such file, or not a JSON object; see `leanseek.reading`.
    """
    return reading.read_json(path, CheckpointError)


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, sharded or not, under its published name.

    Fused experts, which transformers 5 may write (`mlp.experts.gate_up_proj`, 3-D), appear one by one, as published.

    Raises:
        CheckpointError: there are no safetensors files, or a shard is missing or broken.
    """
    tensors: dict[str, Stored] = {}
    if (folder / INDEX).is_file():
        weight_map = _weight_map(folder / INDEX)
        shards = {file: open_file(_beside_index(folder, file)) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in shards[file]:
                raise CheckpointError(
                    f"{folder / INDEX} says that {shorten(name, 200)} is in {shorten(file)}, but it is not"
                )
            tensors[name] = shards[file][name]
    elif (folder / SINGLE).is_file():
        tensors = open_file(folder / SINGLE)
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(f"{folder} has pickled weights only, which are never loaded; convert them to safetensors")
    else:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
    if (folder / MTP_FILE).is_file():
        more = open_file(folder / MTP_FILE)
        if twice := tensors.keys() & more.keys():
            raise CheckpointError(f"{folder / MTP_FILE} holds {min(twice)} once more; it may only add to the others")
        tensors |= more
    return _unfused(tensors)


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of tensor names to file names")
    return weight_map


def _beside_index(folder: Path, file: str) -> Path:
    if Path(file).name != file or not file.endswith(".safetensors"):
        what = "leaves its folder" if "/" in file else "is no safetensors file"
        raise CheckpointError(f"{folder / INDEX} names {shorten(repr(file))}, which {what}")
    if not (folder / file).is_file():
        raise CheckpointError(f"{folder / INDEX} names {shorten(file, 200)}, which is not in the folder")
    return folder / file


def _unfused(tensors: dict[str, Stored]) -> dict[str, Stored]:
    out: dict[str, Stored] = {}
    for name, stored in tensors.items():
        fused = STACKED.fullmatch(name) if len(stored.shape) == 3 else None
        if fused is None:
            out[name] = stored
            continue
        base, kind, scale = fused.groups()
        matrices = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        if not stored.nbytes or stored.shape[1] % len(matrices):
            raise CheckpointError(f"{shorten(name, 200)} has shape {list(stored.shape)}, which no stack of experts has")
        for e, expert in enumerate(stored.chunk(stored.shape[0])):
            parts = expert._replace(shape=expert.shape[1:]).chunk(len(matrices))
            for matrix, part in zip(matrices, parts, strict=True):
                one = f"{base}.{e}.{matrix}.weight{scale}"
                if one in tensors:
                    raise CheckpointError(f"{shorten(one, 200)} is there by itself and in {shorten(name, 200)}")
                out[one] = part
    return out


# ---- writing ----


class Lazy(NamedTuple):
    """A tensor to write: shape and dtype are known beforehand, and `make` runs only when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Sequence[Lazy], metadata: dict[str, str] | None = None) -> list[int]:
    """Write one safetensors file, a tensor at a time, and sync it to disk; returns its bytes and their CRC-32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    offset = 0
    for lazy in tensors:
        header[lazy.name] = {
            "dtype": _CODES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [offset, offset := offset + lazy.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # aligns the data to a cache line
    text = struct.pack("<Q", len(text)) + text
    crc = zlib.crc32(text)
    with open(path, "wb") as file:
        file.write(text)
        for lazy in tensors:
            tensor = lazy.make()
            if tensor.dtype != lazy.dtype or tensor.shape != lazy.shape:
                raise AssertionError(f"{lazy.name} was announced as {lazy.dtype} {lazy.shape}")
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            crc = zlib.crc32(values, crc)
            file.write(values)
        file.flush()
        os.fsync(file.fileno())
    return [len(text) + offset, crc]


def write_shards(folder: Path, tensors: Iterable[Lazy], max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` (at least one tensor each) and their index."""
    shards: list[list[Lazy]] = [[]]
    filled = 0
    for lazy in tensors:
        if shards[-1] and filled + lazy.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(lazy)
        filled += lazy.nbytes
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard)
        weight_map |= {lazy.name: name for lazy in shard}
    total = sum(lazy.nbytes for shard in shards for lazy in shard)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill: it becomes `path` when the block ends, and is removed if anything fails.

    Raises:
        CheckpointError: `path` exists and is not an empty folder, or cannot be written.
        RunError: the disk is full.
    """
    with writing(path, error=CheckpointError):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path} exists and is not empty; choose another path or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(path) as partial:
            yield partial
            (partial / LOCK).unlink()
            partial.replace(path)
