"""A run on other batches, for another objective: what post-training plugs into the loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leanseek.checkpoint.training import Resumed
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.model import Transformer
from leanseek.training import RunConfig, Trainer, train
from leanseek.training.config import ParallelConfig
from leanseek.training.feed import Evaluation, Feed, TokenFeed
from leanseek.training.objective import Losses
from leanseek.training.part import Part

CONFIG = """
[model]
vocab_size = 290
hidden_size = 16
intermediate_size = 24
moe_intermediate_size = 8
num_hidden_layers = 2
num_attention_heads = 2
q_lora_rank = 8
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 4
v_head_dim = 4
n_routed_experts = 4
num_experts_per_tok = 2
n_group = 1
topk_group = 1
num_nextn_predict_layers = 0
[data]
seq_len = 16
[train]
steps = 6
batch_size = 5
micro_batch_size = 2
dtype = "float32"
device = "cpu"
eval_every = 3
[checkpoint]
every = 2
"""


class Distance:
    """The squared size of the last hidden states, each row's by a column of the batch."""

    stages = False

    def __init__(self) -> None:
        self.rows = 0

    def __call__(
        self, model: Transformer, batch: Batch, step: int, hidden: Tensor | None = None, stage: int = 0
    ) -> Losses:
        self.rows += len(batch)
        states, routes = model.hidden(batch.tokens[:, :-1])
        loss = (states.square().mean((1, 2)) * batch.columns["scale"]).sum() / batch.sequences
        nothing = torch.zeros(())
        return Losses(loss, loss, nothing, nothing, routes, None)

    def figures(self) -> dict[str, float]:
        rows, self.rows = self.rows, 0
        return {"rows": rows}


class Counting(Feed):
    """Batches that depend on the ones before: each begins with the count of what was given out."""

    def __init__(self, run: RunConfig, part: Part):
        inner = TokenFeed(run, part)
        self.folder, self.special, self.objective = inner.folder, inner.special, Distance()
        self.tokens, self.run = 0, run

    def attach(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def batch(self, step: int) -> Batch:
        first = int(next(self.trainer.model.parameters()).detach().abs().sum() * 1000) + self.tokens
        ids = torch.arange(first, first + 5 * 17).view(5, 17) % 290
        self.tokens += 5 * 16
        return Batch(ids, 5, columns={"scale": torch.arange(5.0)})

    def figures(self) -> dict[str, Any]:
        return {"reward": self.tokens / 2}

    def evaluate(self, trainer: Trainer, step: int) -> Evaluation:
        return Evaluation({"pass_at_1": step / 10}, f"{step} of 10 pass")

    def state(self) -> dict[str, Any]:
        return {"given": self.tokens}

    def resume(self, then: RunConfig, found: Resumed) -> list[str]:
        self.tokens = found.state["given"]
        return []


@pytest.fixture(scope="module")
def run(run_folder: Callable[[str], Path]) -> RunConfig:
    folder = run_folder(CONFIG)
    return RunConfig.load(str(folder / "run.toml"), [f"data.path={folder / 'shards'}"])


def rows(folder: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    clock = ("tokens_per_second", "flops_per_second", "mfu", "elapsed_s")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in found if "event" not in row]


def test_a_feed_with_an_objective_trains_and_resumes_bit_for_bit(
    run: RunConfig, tmp_path: Path, quick_runs: None
) -> None:
    """Its figures are in the rows; its place is in the checkpoint."""
    train(run, runs=tmp_path / "whole", feed=Counting)
    whole = rows(tmp_path / "whole/run")
    steps = [row for row in whole if "loss" in row]
    assert [(row["reward"], row["rows"], row["tokens"]) for row in steps] == [(40 * i, 5, 80 * i) for i in range(1, 7)]
    assert [row["pass_at_1"] for row in whole if "pass_at_1" in row] == [0.3, 0.6]

    class Stopped(Exception): ...

    class Stopping(Counting):
        def batch(self, step: int) -> Batch:
            if step == 5:
                raise Stopped
            return super().batch(step)

    with pytest.raises(Stopped):
        train(run, runs=tmp_path / "parts", feed=Stopping)
    train(run, resume=True, runs=tmp_path / "parts", feed=Counting)
    assert rows(tmp_path / "parts/run") == whole
    first, second = (
        (tmp_path / f"{n}/run/checkpoints/step-6/model.safetensors").read_bytes() for n in ("whole", "parts")
    )
    assert first == second


def test_a_pipeline_refuses_an_objective_of_whole_networks(run: RunConfig) -> None:
    piped = dataclasses.replace(run, parallel=ParallelConfig(pp=2))
    with pytest.raises(ConfigError, match=r"parallel\.pp = 2: Distance needs the whole network"):
        Trainer(piped, objective=Distance())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_micro_batches_have_the_same_gradient_trl_2617(run: RunConfig, size: int) -> None:
    """Rows with 1 to 12 targets: the denominator is the whole step's."""
    targets = torch.tensor([1, 12, 4, 9, 2])
    weights = (torch.arange(17) < targets[:, None] + 1).float() * (torch.arange(17) > 0) / targets.sum()
    batch = Batch(torch.randint(0, 290, (5, 17)), 5, weights=weights)
    found = {}
    for micro in (0, size):
        trainer = Trainer(dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch_size=micro)))
        result = trainer.step(batch, 1)
        found[micro] = result.loss, result.grad_norm, trainer.model.layers[0].self_attn.o_proj.weight.detach()
    assert found[size][:2] == pytest.approx(found[0][:2], rel=1e-5)
    torch.testing.assert_close(found[size][2], found[0][2], rtol=1e-4, atol=1e-6)
    logits = Trainer(run).model(batch.tokens[:, :-1])
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    assert found[0][0] == pytest.approx(float((each * (weights[:, 1:] > 0)).sum() / targets.sum()), rel=1e-5)


def test_a_batch_keeps_its_columns_together() -> None:
    batch = Batch(
        torch.arange(15).view(5, 3), 10, ((1, 1), (2,), (1,), (2,), (1, 1)), torch.ones(5, 3), {"x": torch.arange(5)}
    )
    parts = batch.split(2)
    assert [part.tokens[:, 0].tolist() for part in parts] == [[0, 3], [6, 9], [12]]
    assert [part.lengths for part in parts] == [((1, 1), (2,)), ((1,), (2,)), ((1, 1),)]
    assert [part.columns["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part.share for part in parts] == [0.2, 0.2, 0.1] and len(batch.split(0)) == 1
    idle = batch.idle()
    assert (idle.share, len(idle), idle.weights.sum()) == (0.0, 1, 0.0)
