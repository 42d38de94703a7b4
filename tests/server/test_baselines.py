"""The baselines that come as configurations train, and serve what they have learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from leanseek import ConfigError, ModelConfig, checkpoint
from leanseek.training import RunConfig, train

SMALL = [
    "model.vocab_size=290", "model.hidden_size=32", "model.intermediate_size=48", "model.head_dim=8", "train.steps=6",
    "schedule.warmup_steps=1", "data.seq_len=32", "data.fim_rate=0.0", "train.batch_size=2", "train.eval_every=6",
    "checkpoint.every=6",
]  # fmt: skip


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize(
    ("preset", "heads"),
    [("llama-like", 4), ("llama-like", 2), ("llama-like", 1), ("mixtral-like", 2), ("switch-like", 4)],
)
def test_a_baseline_trains_and_serves(
    preset: str, heads: int, run_folder: Callable[[str], Path], over: Callable, tmp_path: Path
) -> None:
    own = [] if preset == "llama-like" else ["model.moe_intermediate_size=16"]
    run = RunConfig.load(preset, [*SMALL, *own, f"model.num_key_value_heads={heads}", f"name='{preset}'"])
    assert run.model.attention == "gqa" and run.model.kv_heads == heads
    shards = run_folder("") / "shards"
    train(dataclasses.replace(run, data=dataclasses.replace(run.data, path=str(shards))), runs=tmp_path)
    with over(tmp_path / preset, cache_gib=0.01, packed_copy=False) as served:
        body = {"prompt": "war and peace", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        answer = served.http.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 5
    model = checkpoint.load(tmp_path / preset)
    with pytest.raises(ConfigError, match="no Hugging Face class computes this network"):
        checkpoint.save(model, tmp_path / "hf")


@pytest.mark.parametrize("preset", ["llama-like", "mixtral-like", "switch-like"])
def test_a_baseline_is_the_network_that_it_is_named_after(preset: str) -> None:
    c = ModelConfig.preset(preset)
    experts = [c.n_routed_experts if c.is_moe_layer(layer) else 0 for layer in range(c.num_hidden_layers)]
    assert experts == {"llama-like": [0] * 4, "mixtral-like": [8] * 4, "switch-like": [8, 0, 8, 0]}[preset]
    assert not c.num_nextn_predict_layers and not (any(experts) and c.selection_bias)
