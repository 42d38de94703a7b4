"""A small run that has ended, over a corpus of two domains."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from leanseek.data.prepare import prepare
from leanseek.training import RunConfig, train

WORDS = {"perl-doc": "my sub return shift local foreach push".split(), "hamlet_gut": "thou king sword ghost".split()}


@pytest.fixture(scope="session")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunConfig, Path]]:
    """The run and its folder; two MTP depths, four experts in two layers."""
    folder, draw = tmp_path_factory.mktemp("ended"), random.Random(0)
    (folder / "texts").mkdir()
    for name, words in WORDS.items():
        texts = (" ".join(draw.choices(words, k=60)) for _ in range(60))
        (folder / f"texts/{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare([folder / "texts"], folder / "shards", train_vocab=280, validation_fraction=0.3, workers=1)
    run = RunConfig.from_dict(
        {
            "name": "ended",
            "model": {
                "vocab_size": 280, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
                "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
                "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8,
                "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                "num_nextn_predict_layers": 2, "initializer_range": 0.05,
            },
            "data": {"path": str(folder / "shards"), "seq_len": 32, "fim_rate": 0.0},
            "train": {"steps": 40, "batch_size": 4, "eval_every": 40, "eval_sequences": 8},
            "optimizer": {"lr": 5e-3},
            "schedule": {"final_lr": 1e-3, "last_lr": 1e-3},
        }
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leanseek.training.report.write_report", lambda *_: None)
        train(run, runs=folder)
    yield run, folder / "ended"
