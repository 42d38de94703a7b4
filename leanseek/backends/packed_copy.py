"""Weights as the CPU's kernels read them, in a file that is mapped: a second start reads nothing and packs nothing.

The file holds the weights by name, each in the order of `native.panels` where that takes no more room. Its
name holds a checksum of what it was made of, so a changed checkpoint, or another version's order, never meets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leanseek.backends.panels import EMBEDDING, HEAD, refusal
from leanseek.checkpoint.files import CheckpointError, Lazy, Stored, open_file, write_file
from leanseek.checkpoint.hf import read_config
from leanseek.config import ModelConfig
from leanseek.errors import InputError
from leanseek.machine.memory import read_ahead
from leanseek.model import Transformer
from leanseek.ops.weights import FORMATS, QuantizedWeight, StoredWeight, named_weights
from leanseek.writing import LOCK, alone

log = logging.getLogger(__name__)

FOLDER = ".leanseek"  # in the checkpoint's folder
LAYOUT = 2  # version of the file's names and of the order of native.panels
LEAST = 2**28  # bytes of weights: fewer are packed in no time


class PackedCopy:
    """The packed copy of a checkpoint folder's weights, held in `dtype` (as `load`), there or yet to be written."""

    def __init__(self, folder: Path, dtype: str, int8_head: bool):
        self._source = folder
        self._folder = folder / FOLDER
        self._stamp = _stamp(folder)
        self._int8_head = int8_head
        self.path = self._folder / f"packed-{self._stamp}-{dtype}{'-int8-head' * int8_head}.safetensors"

    def read(self) -> tuple[ModelConfig, dict[str, StoredWeight]] | None:
        """The network and its weights, mapped and in the panels' order. None if there is no copy."""
        try:
            stored = {} if self._folder.is_symlink() else open_file(self.path)
            weights = _unflattened(_mapped(self.path, stored)) if stored else {}
        except (CheckpointError, KeyError, ValueError):  # broken
            weights = {}
        config = read_config(self._source)
        if not any(name.startswith("mtp.") for name in weights):
            config = dataclasses.replace(config, num_nextn_predict_layers=0)
        expected = {name: weight.shape for name, weight in named_weights(Transformer(config, "meta")).items()}
        if self._int8_head:
            expected[HEAD] = expected[EMBEDDING]
        if {name: weight.shape for name, weight in weights.items()} != expected or refusal(config, weights):
            return None
        return config, weights

    def save(self, weights: Mapping[str, StoredWeight]) -> threading.Thread | None:
        """Write weights that were packed in place, in the background, by the thread that is returned.

        It takes as much disk as the weights, and is not written where less than that would be left.
        """
        state = _flattened(weights)
        size = sum(t.nbytes for t in state.values())
        if size < LEAST:
            return None
        thread = threading.Thread(target=self._write, args=(state, size), name="packed copy", daemon=True)
        thread.start()
        return thread

    def _write(self, state: dict[str, Tensor], size: int) -> None:
        # whole cache lines first, so that all that kernels read begins at one
        ordered = sorted(state.items(), key=lambda item: (item[1].nbytes % 64 > 0, -item[1].element_size()))
        lazies = [Lazy(name, t.dtype, tuple(t.shape), t.detach) for name, t in ordered]
        try:
            self._folder.mkdir(exist_ok=True)
            if self._folder.is_symlink():
                return
            with alone(self._folder / LOCK, InputError("another start writes it")):
                partial = self._folder / "partial"
                partial.unlink(missing_ok=True)  # left by a start that was killed while writing
                for old in self._folder.glob("packed-*.safetensors"):
                    if not old.name.startswith(f"packed-{self._stamp}-"):
                        old.unlink()  # nothing will map it again
                if shutil.disk_usage(self._folder).free < 2 * size:  # judged when all that is ours to clear is gone
                    log.info("no packed copy of the weights in %s: it would leave the disk too full", self._folder)
                    return
                try:
                    write_file(partial, lazies)
                    partial.replace(self.path)
                finally:
                    partial.unlink(missing_ok=True)
            log.info("wrote %s: the next start maps it", self.path)
        except (OSError, InputError) as error:
            log.info("no packed copy of the weights in %s: %s", self._folder, error)


def _stamp(folder: Path) -> str:
    """A hash of the headers of a folder's weights and of the files' sizes and times, which change with any write."""
    seen: list[object] = [LAYOUT]
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"))):
        with contextlib.suppress(OSError), open(path, "rb") as file:  # what cannot be read is for `load` to tell
            status = os.stat(file.fileno())
            head = hashlib.sha256(file.read(2**20)).hexdigest()
            seen.append((path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, head))
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _flattened(weights: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
    """A quantised weight as two tensors, its format in their names."""
    flat: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantizedWeight):
            flat[f"{name}@{weight.format.name}"], flat[f"{name}@{weight.format.name}.scale"] = weight.data, weight.scale
        else:
            flat[name] = weight
    return flat


def _unflattened(flat: Mapping[str, Tensor]) -> dict[str, StoredWeight]:
    """Raises KeyError or ValueError for what `_flattened` does not write."""
    weights: dict[str, StoredWeight] = {}
    for key, tensor in flat.items():
        name, quantized, format = key.partition("@")
        if not quantized:
            weights[name] = tensor
        elif not format.endswith(".scale"):
            weights[name] = QuantizedWeight(tensor, flat[f"{key}.scale"], FORMATS[format])
    return weights


def _mapped(path: Path, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors over the file's own pages, shared by all processes that map it; read ahead from the disk."""
    # not torch.from_file, which spells a path in UTF-8; a private mapping may be written, so torch does not warn
    pages = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
    read_ahead(pages.data_ptr(), pages.numel())
    return {
        name: pages[s.start : s.start + math.prod(s.shape) * s.dtype.itemsize].view(s.dtype).view(s.shape)
        for name, s in stored.items()
    }
