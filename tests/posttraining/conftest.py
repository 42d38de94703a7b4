"""A small chat model on disk, with random weights and a tokenizer of single bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leanseek
from leanseek import ModelConfig, Transformer
from tests.small import NETWORK, byte_tokenizer

CONFIG: dict[str, Any] = NETWORK | {
    "vocab_size": 264,
    "q_lora_rank": 24,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MARKS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")


def write_tokenizer(folder: Path) -> None:
    """Single bytes and the tokens of R1's chat format, of which the thought's marks are not special."""
    inner = byte_tokenizer(MARKS[:4], MARKS[4:])
    inner.add_tokens(list(MARKS[4:]))
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": MARKS[0], "eos_token": MARKS[1]}))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """chat_model(**config changes): the folder of a chat model with random weights."""

    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("models") / "tiny"
        leanseek.save(Transformer(ModelConfig(**CONFIG | changes)).init_weights(3), folder)
        write_tokenizer(folder)
        return folder

    return make
