"""Converts checkpoints as a stream of tensors: a 671B folder needs only the memory of its largest tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from leanseek.checkpoint import blocks
from leanseek.checkpoint.beside import copy_beside
from leanseek.checkpoint.files import CheckpointError, Lazy, atomic_folder, read_json, write_json
from leanseek.checkpoint.finite import Census
from leanseek.checkpoint.hf import described, open_checkpoint, resolve, write_weights

_FORMATS = {"bf16": blocks.as_bf16, "fp8": blocks.as_fp8}


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    max_shard_bytes: int = 5 * 10**9,
    allow_links: bool = False,
    allow_nonfinite: bool = False,
) -> list[str]:
    """Write the checkpoint `source` (a folder or a run) to `out`; `to` is bf16 or fp8 (128×128 blocks and BF16).

    Only the weights' format changes: MTP layers, every key of config.json and the files beside the weights stay.
    `e_score_correction_bias` stays as stored. progress(done, total) gets the bytes written. Returns a line for each
    file that was skipped.

    Raises:
        CheckpointError: `source` is broken (as in `load`) or contains NaN or infinity (unless `allow_nonfinite`), `out`
            is not empty or cannot be written, or `to` is unknown.
        RunError: the disk is full.
    """
    if to not in _FORMATS:
        raise CheckpointError(f"--to {to!r} is not one of {', '.join(_FORMATS)}")
    folder = resolve(source, allow_links)
    model, stored = open_checkpoint(folder)
    census = Census()
    source_tensors = {n: census.watched(Lazy(n, s.dtype, s.shape, s.read)) for n, s in stored.items()}
    tensors = list(_FORMATS[to](source_tensors))
    total, done = sum(lazy.nbytes for lazy in tensors), 0

    def counted(lazy: Lazy) -> Tensor:
        nonlocal done
        tensor = lazy.make()
        done += lazy.nbytes
        progress(done, total)
        return tensor

    values = read_json(folder / "config.json")
    quantization = values.pop("quantization_config", None)
    with atomic_folder(Path(out)) as partial:
        about = described(tensors)
        if quantization and "quantization_config" in about:  # FP8 passes through: keep every key
            about["quantization_config"] = quantization
        write_json(partial / "config.json", values | about)
        left = copy_beside(folder, partial, allow_links)
        watched = [lazy._replace(make=functools.partial(counted, lazy)) for lazy in tensors]
        write_weights(partial, watched, model.config, max_shard_bytes)
        census.judge(allow_nonfinite)
    return left
