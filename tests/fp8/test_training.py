"""Training in FP8 as a whole: what it keeps, and what the experiment's planted outliers may change."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from leanseek import fp8
from leanseek.data.batch import Batch
from leanseek.training import RunConfig, Trainer
from leanseek.training.activations import activation_bytes_per_token


def trainer(precision: str, *overrides: str) -> Trainer:
    run = RunConfig.load("bench-30m", ["model.num_hidden_layers=2", "train.dtype=bfloat16", *overrides])
    return Trainer(dataclasses.replace(run, train=dataclasses.replace(run.train, precision=precision)))


def batch(sequences: int, length: int) -> torch.Tensor:
    return torch.randint(0, 4096, (sequences, length + 1), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    path = Path(__file__).parents[2] / "experiments/fp8/long/run.py"
    spec = importlib.util.spec_from_file_location("fp8_experiment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_activations_take_at_most_six_tenths_of_bf16s() -> None:
    """Of bench-30m's layers, by the allocator (3.3.3: what is kept for backward is FP8)."""
    bytes_of = {p: activation_bytes_per_token(trainer(p), batch(2, 64)) for p in ("bf16", "fp8")}
    assert bytes_of["fp8"] <= 0.6 * bytes_of["bf16"], bytes_of


def test_planted_outliers_do_not_touch_bf16(experiment: ModuleType) -> None:
    """Powers of two are exact there, so the plain run is the planted one's reference; and tiles hold them apart."""

    def loss(precision: str, planted: bool) -> float:
        found = trainer(precision)
        if planted:
            experiment.plant(found.model)
        return found.step(Batch(batch(2, 64), 2), 0).loss

    assert loss("bf16", True) == loss("bf16", False)
    assert loss("fp8-tensorwise", True) != loss("fp8-tensorwise", False)


def test_only_linears_and_experts_are_in_fp8() -> None:
    """3.3.1: embedding, head, gate, norms and the core of attention stay as they are; names and weights always do."""
    model = trainer("bf16", "model.num_nextn_predict_layers=1").model
    kinds, weights = {name: type(m) for name, m in model.named_modules()}, dict(model.named_parameters())
    fp8.apply(model, "fp8")
    inside = set(fp8.observe(model))
    assert {"layers.0.self_attn.o_proj", "layers.1.mlp.experts", "layers.1.mlp.shared_experts"} <= inside
    assert not any(word in name for name in inside for word in ("embed", "lm_head", "norm", "gate.", "eh_proj"))
    assert (
        all(weights[name] is p for name, p in model.named_parameters()) and len(weights) == len(model.state_dict()) - 2
    )
    fp8.apply(model, "bf16")
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert not fp8.observe(model)
