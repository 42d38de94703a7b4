"""A tiny model whose tokens are bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

import leanseek
from leanseek import LLM, ModelConfig, Transformer
from leanseek.evaluation.scoring import Scorer
from tests.small import NETWORK, byte_tokenizer

CONFIG = NETWORK | {
    "vocab_size": 258,
    "q_lora_rank": 24,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    leanseek.save(Transformer(ModelConfig(**CONFIG)).init_weights(3), path)
    byte_tokenizer(["<begin>", "<end>"]).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(LLM(folder, cache_gib=0.01))
