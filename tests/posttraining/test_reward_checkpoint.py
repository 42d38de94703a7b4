"""A reward model on disk: transformers' sequence classifier, and no language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import leanseek
from leanseek import LLM, ModelConfig, Transformer
from leanseek.checkpoint import CheckpointError, export_gguf
from leanseek.config import ConfigError
from leanseek.errors import InputError
from leanseek.planning.flops import parameters
from leanseek.training import RunConfig
from leanseek.training.origin import first_model
from leanseek.training.part import Part


@pytest.fixture
def reward_model(tiny_model: Callable[..., Transformer]) -> Transformer:
    return tiny_model(num_labels=1, n_group=1, topk_group=1)


def test_it_loads_back_with_the_same_scores(
    reward_model: Transformer, tiny_tokens: torch.Tensor, tmp_path: Path
) -> None:
    leanseek.save(reward_model, tmp_path / "rm")
    again = leanseek.load(tmp_path / "rm", dtype="float32")
    with torch.no_grad():
        assert again(tiny_tokens).shape == (2, 20, 1)
        torch.testing.assert_close(again(tiny_tokens), reward_model(tiny_tokens), rtol=0, atol=0)
    assert again.config == reward_model.config and again.lm_head is None
    assert sum(p.numel() for p in again.parameters()) == parameters(again.config)


def test_transformers_scores_the_same(reward_model: Transformer, tiny_tokens: torch.Tensor, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    leanseek.save(reward_model, tmp_path / "rm")
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    assert type(judge).__name__ == "DeepseekV3ForSequenceClassification"
    with torch.no_grad():
        for row in tiny_tokens:
            ours = reward_model(row[None])[0, -1]
            torch.testing.assert_close(judge(row[None]).logits[0], ours, rtol=1e-4, atol=1e-5)
    judge.save_pretrained(tmp_path / "theirs")
    again = leanseek.load(tmp_path / "theirs", dtype="float32")
    assert again.config.num_labels == 1
    with torch.no_grad():
        torch.testing.assert_close(again(tiny_tokens), reward_model(tiny_tokens), rtol=0, atol=0)


def test_a_classifier_of_two_labels_is_no_reward_model(reward_model: Transformer, tmp_path: Path) -> None:
    leanseek.save(reward_model, tmp_path / "rm")
    file = tmp_path / "rm" / "config.json"
    for changes in ({"id2label": {"0": "bad", "1": "good"}}, {"id2label": None}):
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match="num_labels = 2 should be less than or equal to 1"):
            leanseek.load(tmp_path / "rm")


def test_it_is_no_language_model(reward_model: Transformer, tmp_path: Path) -> None:
    leanseek.save(reward_model, tmp_path / "rm")
    with pytest.raises(InputError, match=r"rm is a reward model: its score.weight, in place of an output head"):
        LLM(tmp_path / "rm")
    with pytest.raises(ConfigError, match="a reward model scores texts and writes none"):
        _ = reward_model.head_weight
    with pytest.raises(InputError, match="a reward model"):
        export_gguf(tmp_path / "rm", tmp_path / "rm.gguf")
    with pytest.raises(ConfigError, match="num_nextn_predict_layers must be 0"):
        ModelConfig(num_labels=1)


def test_a_language_model_says_nothing_of_labels(tiny_config: Callable[..., ModelConfig]) -> None:
    hf = tiny_config().to_hf()
    assert hf["architectures"] == ["DeepseekV3ForCausalLM"] and not {"num_labels", "id2label"} & hf.keys()
    assert ModelConfig.from_hf(hf | {"num_labels": 2, "id2label": {"0": "A"}}).num_labels == 0


@pytest.mark.parametrize("mtp", [0, 1])
def test_it_begins_with_the_weights_of_a_language_model(
    tiny_model: Callable[..., Transformer], tiny_tokens: torch.Tensor, tmp_path: Path, mtp: int
) -> None:
    """All but its head and MTP modules; the score begins at zero."""
    before = tiny_model(num_nextn_predict_layers=mtp)
    leanseek.save(before, tmp_path / "base")
    toml = f'from = "{tmp_path / "base"}"\n[model]\nnum_labels = 1\nnum_nextn_predict_layers = 0\n[train]\nsteps = 4\n'
    (tmp_path / "rm.toml").write_text(toml + "[data]\nseq_len = 16\n")
    run = RunConfig.load(str(tmp_path / "rm.toml"), [])
    model = first_model(run.source, 0, run.model, Part())
    with torch.no_grad():
        assert not model(tiny_tokens).any()
        torch.testing.assert_close(model.hidden(tiny_tokens)[0], before.hidden(tiny_tokens)[0], rtol=0, atol=0)
    leanseek.save(tiny_model(num_labels=1), tmp_path / "rm")  # and a reward model goes on as one
    again = first_model(str(tmp_path / "rm"), 0, run.model, Part())
    assert again.score.weight.any()
    with pytest.raises(ConfigError, match=r"model.num_labels = 0, but"):
        text = toml.replace("base", "rm").replace("num_labels = 1", "num_labels = 0")
        (tmp_path / "rm.toml").write_text(f"{text}[data]\nseq_len = 16\n")
        RunConfig.load(str(tmp_path / "rm.toml"), [])
