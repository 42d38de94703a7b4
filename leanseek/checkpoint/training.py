"""Checkpoints to resume from, `checkpoints/step-N/`, written atomically.

A folder is a Hugging Face folder (config.json, model.safetensors, the tokenizer), which loads like any other, plus
state.safetensors (moments, EMA) and state.json (step, position in the data, configuration, spike guard, and a
checksum of every file).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from leanseek import reading
from leanseek.checkpoint.files import CheckpointError, Lazy, open_file, write_file
from leanseek.checkpoint.hf import write_model
from leanseek.checkpoint.tokenizer import copy_tokenizer
from leanseek.model import Transformer
from leanseek.reading import Count, Structure, checked

STATE = "state.json"  # written last


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


class Resumed(NamedTuple):
    """A verified checkpoint."""

    folder: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def write_checkpoint(
    run: Path, step: int, model: Transformer, tensors: dict[str, Tensor], state: dict[str, Any], tokenizer_from: Path
) -> Path:
    """Write `run/checkpoints/step-N` atomically: it is synced to disk before it gets its name.

    Raises:
        OSError: the disk is full, for example; older checkpoints are untouched and the partial folder is removed.
    """
    final = run / "checkpoints" / f"step-{step}"
    partial = final.with_name(f".step-{step}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_model(model, partial)
        lazies = [Lazy(name, t.dtype, tuple(t.shape), t.detach) for name, t in tensors.items()]
        write_file(partial / "state.safetensors", lazies)
        copy_tokenizer(tokenizer_from, partial, model.config)
        files = {p.name: [p.stat().st_size, _crc(p)] for p in sorted(partial.iterdir())}
        state = state | {"step": step, "files": files}
        (partial / STATE).write_text(json.dumps(state | {"checksum": _checksum(state)}, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(final.parent)
    return final


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


def newest_checkpoint(run: Path) -> tuple[Resumed | None, list[str]]:
    """The newest checkpoint with correct checksums, and a line for each newer one that was skipped."""
    passed: list[str] = []
    for step in reversed(steps_on_disk(run)):
        try:
            return read_checkpoint(run / "checkpoints" / f"step-{step}"), passed
        except CheckpointError as error:
            passed.append(str(error))
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


def read_checkpoint(folder: Path) -> Resumed:
    """The state of one checkpoint; use `load` for the model.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    state = check(folder)
    tensors = {name: stored.read() for name, stored in open_file(folder / "state.safetensors").items()}
    return Resumed(folder, state["step"], state, tensors)


def check(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its checksum; returns the state.json.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    try:
        state = reading.read_json(folder / STATE, CheckpointError)
        checked(_State, state, str(folder / STATE), CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / STATE} is missing or corrupt ({error})") from None
    if state.pop("checksum") != _checksum(state):
        raise CheckpointError(f"{folder / STATE} is missing or corrupt (checksum)")
    for name, (size, crc) in state["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or _crc(path) != crc:
            raise CheckpointError(f"{path} is missing, truncated or corrupt (checksum)")
    return state


@torch.no_grad()
def load_ema(model: Transformer, folder: Path) -> Transformer:
    """Replace the model's weights by the averaged ones of the training checkpoint `folder`; returns the model.

    Raises:
        CheckpointError: the checkpoint has no averaged weights, or one is missing or has another shape.
    """
    path = folder / "state.safetensors"
    stored = open_file(path) if path.is_file() else {}
    if not any(name.startswith("ema.") for name in stored):
        raise CheckpointError(f"{folder} has no averaged weights; a run keeps them with optimizer.ema, such as 0.999")
    for name, parameter in model.named_parameters():
        found = stored.get(f"ema.{name}")
        if found is None or found.shape != tuple(parameter.shape):
            shape = "missing" if found is None else f"of shape {list(found.shape)}, not {list(parameter.shape)}"
            raise CheckpointError(f"{path}: ema.{name} is {shape}")
        found.copy_to(parameter.data)
    return model


def _checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _remove(folder: Path) -> None:
    """Delete a checkpoint atomically: it loses its name before its files go."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
