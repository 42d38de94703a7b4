"""Copies and finds the tokenizer's files beside the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from leanseek.checkpoint.files import CheckpointError, write_json
from leanseek.config import ModelConfig
from leanseek.reading import check_links
from leanseek.tokens import open_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tiktoken.model",  # Kimi-K2 has this and its code instead of a tokenizer.json
    "tokenization_kimi.py",
)


def copy_tokenizer(source: Path, folder: Path, config: ModelConfig, allow_links: bool = True) -> None:
    """Copy the tokenizer of `source` (a folder, or a tokenizer.json, with the files beside it) into `folder`.

    If there is only a tokenizer.json, we add a `tokenizer_config.json`: transformers would assume a Llama tokenizer.

    Raises:
        CheckpointError: `source` has no tokenizer, or (unless `allow_links`) one of its files is a link to the outside.
    """
    if source.is_file() and source.name == "tokenizer.json":
        source = source.parent
    if source.is_dir() and not allow_links:
        check_links(source, CheckpointError)
    if source.is_file():
        shutil.copyfile(source, folder / "tokenizer.json")
    elif not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{source} has no tokenizer.json")
    else:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        tokenizer = open_tokenizer(folder / "tokenizer.json")
        bos = None if config.bos_token_id is None else tokenizer.id_to_token(config.bos_token_id)
        eos = tokenizer.id_to_token(config.eos_token_ids[0]) if config.eos_token_ids else None
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", values)


def find_tokenizer(checkpoint: Path, allow_links: bool = False) -> Path | None:
    """The folder with the tokenizer of a checkpoint: the checkpoint folder itself or its run; None if neither has one.

    Raises:
        CheckpointError: a file there is a link to the outside, and `allow_links` is not set.
    """
    run = [checkpoint.parent.parent] if checkpoint.parent.name == "checkpoints" else []
    found = next((folder for folder in (checkpoint, *run) if tokenizer_json(folder)), None)
    if found and not allow_links:
        check_links(found, CheckpointError)
    return found


def tokenizer_json(source: Path) -> Path | None:
    """The tokenizer.json of a folder, or `source` itself if it is a file; None if there is none."""
    path = source if source.is_file() else source / "tokenizer.json"
    return path if path.is_file() else None
