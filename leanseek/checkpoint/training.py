"""Checkpoints to resume from, `checkpoints/step-N/`, whatever layout of ranks wrote them (writer.py).

A folder is a Hugging Face folder (config.json, model.safetensors or shards with an index, the tokenizer), which loads
like any other, plus state.safetensors, or one of each rank, (moments, EMA) and state.json (step, position in the data,
configuration, spike guard, and a checksum of every file).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from leanseek import reading
from leanseek.checkpoint.files import MOST_DIMENSIONS, CheckpointError, Stored, open_described
from leanseek.checkpoint.pieces import Spread, check_tiling
from leanseek.checkpoint.ranks import Ranks, failing_together
from leanseek.errors import InputError
from leanseek.model import Transformer
from leanseek.reading import Count, Structure, checked, parse_json, shorten

STATE = "state.json"  # written last
PIECES = "pieces"  # key in a safetensors header: {name: {start, shape}} of tensors that the file holds in part


class _Guard(Structure):
    losses: list[float]
    in_a_row: Count


Size = Annotated[list[Count], Field(min_length=2, max_length=2)]


class _State(Structure):
    """state.json. Checkpoints of older versions lack the fields that have defaults."""

    step: Count
    checksum: int
    files: dict[Annotated[str, Field(pattern="^[^/]+$")], Size]  # [bytes, crc32]
    samples: Count | None = None
    tokens: Count | None = None
    skipped: Count = 0
    config: str | None = None
    without_moments: list[str] | None = None
    data: Size | None = None  # documents, tokens
    guard: _Guard | None = None


class _Place(Structure):
    start: Count
    shape: list[Count] = Field(max_length=MOST_DIMENSIONS)


class _Places(Structure):
    of: dict[str, _Place]


class Resumed(NamedTuple):
    """A verified checkpoint."""

    folder: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, Spread]  # by name, such as exp_avg.NAME; not read yet


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def steps_on_disk(run: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending."""
    found = (re.fullmatch(r"step-(\d+)", p.name) for p in (run / "checkpoints").glob("step-*"))
    return sorted(int(m[1]) for m in found if m)


def prune(run: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every` (0: none)."""
    for step in steps_on_disk(run)[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            _remove(run / "checkpoints" / f"step-{step}")
    for partial in (run / "checkpoints").glob(".step-*"):  # left by a run that was killed while writing or removing
        shutil.rmtree(partial, ignore_errors=True)


def newest_checkpoint(run: Path, ranks: Ranks | None = None) -> tuple[Resumed | None, list[str]]:
    """The newest checkpoint with correct checksums, and a line for each newer one that was skipped.

    Several ranks share the reading of the files for their checksums, and come to the same result.
    """
    ranks = ranks or Ranks()
    passed: list[str] = []
    for step in reversed(ranks.gather(steps_on_disk(run))[0]):
        folder = checkpoint_folder(run, step)
        found = None
        try:
            with failing_together(ranks):
                found = read_checkpoint(folder, ranks)
        except InputError as error:
            passed.append(str(error))
        else:
            return found, passed
    return None, passed


def set_aside(run: Path, step: int) -> None:
    """Rename the broken checkpoints after `step` to `broken-step-N`, so that nothing uses them."""
    for later in steps_on_disk(run):
        if later > step:
            aside = run / "checkpoints" / f"broken-step-{later}"
            shutil.rmtree(aside, ignore_errors=True)
            (run / "checkpoints" / f"step-{later}").rename(aside)


def newest_whole(run: Path) -> Path | None:
    """The folder of the newest checkpoint with correct checksums, without reading its tensors."""
    for step in reversed(steps_on_disk(run)):
        folder = run / "checkpoints" / f"step-{step}"
        try:
            check(folder)
            return folder
        except CheckpointError:
            continue
    return None


def read_checkpoint(folder: Path, ranks: Ranks | None = None) -> Resumed:
    """One checkpoint; use `load` or `load_pieces` for the model.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    state = check(folder, ranks)
    return Resumed(folder, state["step"], state, open_state(folder))


def open_state(folder: Path) -> dict[str, Spread]:
    """The tensors of a checkpoint beside the model, not read yet, from the files of all ranks that wrote it.

    Raises:
        CheckpointError: a file is missing or corrupt, or some values of a tensor are missing or there twice.
    """
    found: dict[str, list[_Part]] = {}
    for path in _state_files(folder):
        for name, part in _parts(path).items():
            first = found.setdefault(name, [part])[0]
            if (part.shape, part.stored.dtype) != (first.shape, first.stored.dtype):
                raise CheckpointError(f"{path}: {shorten(name, 200)} has another shape or dtype than in {first.file}")
            if part is not first:
                found[name].append(part)
    for name, parts in found.items():
        ranges = [(part.start, math.prod(part.stored.shape), f"in {part.file}") for part in parts]
        try:
            check_tiling(name, math.prod(parts[0].shape), ranges, "in no file")
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
    return {
        name: Spread(parts[0].shape, parts[0].stored.dtype, [(part.start, part.stored) for part in parts])
        for name, parts in found.items()
    }


class _Part(NamedTuple):
    """What one file holds of a tensor."""

    file: str
    shape: tuple[int, ...]  # of the whole
    start: int
    stored: Stored


def _state_files(folder: Path) -> list[Path]:
    """One file, or one of each rank that had something to write."""
    one, several = folder / "state.safetensors", sorted(folder.glob("state-*-of-*.safetensors"))
    return [one, *several] if one.is_file() or not several else several


def _parts(path: Path) -> dict[str, _Part]:
    """The tensors in one file of the state, with their places in the whole: PIECES in its metadata."""
    tensors, metadata = open_described(path)
    text = metadata.get(PIECES, "{}") if isinstance(metadata, dict) else "{}"
    where = f"{path}: {PIECES} in its header"
    if not isinstance(text, str):
        raise CheckpointError(f"{where} is not a text")
    places = checked(_Places, {"of": parse_json(text, where, CheckpointError)}, where, CheckpointError).of
    if foreign := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{where} names {shorten(foreign[0])}, which the file does not hold")
    parts = {name: _Part(path.name, stored.shape, 0, stored) for name, stored in tensors.items()}
    for name, place in places.items():
        parts[name] = parts[name]._replace(shape=tuple(place.shape), start=place.start)
    return parts


def check(folder: Path, ranks: Ranks | None = None) -> dict[str, Any]:
    """Check every file of a checkpoint against its checksum, this rank's share if several do so; returns state.json.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    try:
        state = reading.read_json(folder / STATE, CheckpointError)
        checked(_State, state, str(folder / STATE), CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / STATE} is missing or corrupt ({error})") from None
    if state.pop("checksum") != checksum(state):
        raise CheckpointError(f"{folder / STATE} is missing or corrupt (checksum)")
    first, step = (ranks.rank, ranks.ranks) if ranks else (0, 1)
    by_size = sorted(state["files"].items(), key=lambda file: (-file[1][0], file[0]))
    for name, (size, crc) in by_size[first::step]:
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or crc32(path) != crc:
            raise CheckpointError(f"{path} is missing, truncated or corrupt (checksum)")
    return state


@torch.no_grad()
def load_ema(model: Transformer, folder: Path) -> Transformer:
    """Replace the model's weights by the averaged ones of the training checkpoint `folder`; returns the model.

    Raises:
        CheckpointError: the checkpoint has no averaged weights, or one is missing or has another shape.
    """
    stored = open_state(folder) if _state_files(folder)[0].is_file() else {}
    if not any(name.startswith("ema.") for name in stored):
        raise CheckpointError(f"{folder} has no averaged weights; a run keeps them with optimizer.ema, such as 0.999")
    for name, parameter in model.named_parameters():
        found = stored.get(f"ema.{name}")
        if found is None or found.shape != tuple(parameter.shape):
            shape = "missing" if found is None else f"of shape {list(found.shape)}, not {list(parameter.shape)}"
            raise CheckpointError(f"{folder}: ema.{name} is {shape}")
        found.copy_to(parameter.data)
    return model


def checksum(state: dict[str, Any]) -> int:
    """The CRC-32 of what state.json says."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _remove(folder: Path) -> None:
    """Delete a checkpoint atomically: it loses its name before its files go."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def crc32(path: Path) -> int:
    """The CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc
