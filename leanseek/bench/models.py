"""Models to measure: a preset's network with random weights, as a Hugging Face folder that is made once and kept."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from torch import Tensor

from leanseek.checkpoint import iter_hf_tensors
from leanseek.checkpoint.blocks import as_bf16, as_fp8
from leanseek.checkpoint.files import Lazy, atomic_folder, write_json
from leanseek.checkpoint.hf import described, write_weights
from leanseek.config import ModelConfig
from leanseek.errors import InputError
from leanseek.model import Transformer

STD = 0.02
SHARD_BYTES = 5 * 10**9


def cache_root() -> Path:
    """Default folder of the models to measure."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leanseek" / "bench"


def random_model(preset: str, format: Literal["fp8", "bf16", "fp32"], root: Path) -> Path:
    """The folder under `root` with the preset's network, weights normal(0, 0.02), and a tokenizer of its size.

    Made at the first call, a tensor at a time, and found by later ones; the same weights (before rounding to the
    format) wherever it is made. The folder appears whole or not at all, and what a killed process left is removed.

    Raises:
        InputError: there is no such preset, or nothing can be written under `root`.
    """
    config = ModelConfig.preset(preset)
    described_by = json.dumps([config.to_dict(), STD], sort_keys=True)
    folder = root / f"{preset}-{format}-{hashlib.sha256(described_by.encode()).hexdigest()[:8]}"
    with _locked(root, folder.name):
        if folder.is_dir():
            return folder
        tensors = list(_tensors(config, format))
        with atomic_folder(folder) as partial:
            write_json(partial / "config.json", config.to_hf() | described(tensors))
            (partial / "tokenizer.json").write_text(_tokenizer(config).to_str(), encoding="utf-8")
            write_weights(partial, tensors, config, SHARD_BYTES)
    return folder


@contextlib.contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """One process at a time; the system lets go of the lock when its holder dies."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / f".{name}.lock", "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"{root}, where models to measure are kept, cannot be written: {error.strerror}; set XDG_CACHE_HOME"
        ) from None
    with lock as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tensors(config: ModelConfig, format: str) -> Iterator[Lazy]:
    source = {
        name: Lazy(name, torch.float32, tuple(meta.shape), functools.partial(_random, name, tuple(meta.shape)))
        for name, meta in iter_hf_tensors(Transformer(config, device="meta"))
    }
    if format == "fp32":
        return iter(source.values())
    return as_fp8(source) if format == "fp8" else as_bf16(source)


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)  # of an RMSNorm
    return torch.empty(shape).normal_(0, STD, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def _tokenizer(config: ModelConfig) -> tokenizers.Tokenizer:
    """Every id spells something: the two ends, the bytes, then words that no text is split into."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    spelled = ["<begin>", "<end>", *alphabet]
    spelled += [f"Ġ{number}" for number in range(len(spelled), config.vocab_size - 1)] + ["Ġ!"]
    merges = [("Ġ", "!")]  # llama.cpp takes no vocabulary without one
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(spelled)}, merges))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(spelled[:2])
    return inner
