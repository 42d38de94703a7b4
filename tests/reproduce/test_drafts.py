"""What is measured of drafts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.config import ModelConfig
from leanseek.data.loader import Batch, TokenDataset
from leanseek.reproduce import drafts
from leanseek.training import RunConfig


class Counting:
    """A network for which after n comes n + 1, and whose second module is wrong about every third token."""

    def hidden(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, list]:
        return tokens, []

    def predict_ahead(self, hidden: Tensor, targets: Tensor) -> tuple[list[Tensor], list]:
        assert torch.equal(targets[:, : hidden.shape[1]], hidden + 1)
        return [hidden + 1, hidden + 2 + (hidden % 3 == 0)], []

    def head(self, hidden: Tensor) -> Tensor:
        return F.one_hot(hidden + 1, 64)


def test_a_draft_agrees_with_what_the_main_model_says_later(
    ended: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = ended
    monkeypatch.setattr(drafts, "load", lambda *_, **__: Counting())
    monkeypatch.setattr(TokenDataset, "in_order", lambda *_: [Batch(torch.arange(35)[None], 1)])
    assert drafts.agreement(run, folder) == [1.0, 20 / 30]  # positions 0 to 29, ten of them multiples of three


def test_of_a_run(ended: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NEW": 12, "TURNS": 1, "TIMED": 5, "PROMPT": 16}.items():
        monkeypatch.setattr(drafts, name, value)
    found = drafts.measure(*ended, quick=True)
    assert len(found["agreement"]) == 2 and all(0 < share < 1 for share in found["agreement"])
    for kind in ("greedy", "sampled"):
        speed = found["generation"][kind]
        assert all(rate > 0 for rate in speed["tokens_per_second"].values())
        assert len(speed["acceptance"]) == 2 and all(0 <= share <= 1 for share in speed["acceptance"])
        assert 0 < speed["steps_with_drafts"] < 1
    assert set(found["speedup"]) == {"3", "61"}
    without = dataclasses.replace(ended[0], model=dataclasses.replace(ended[0].model, num_nextn_predict_layers=0))
    assert set(drafts.generation(without, ended[1], 1)["greedy"]["tokens_per_second"]) == {"plain"}


def test_speedup_of_a_deeper_network() -> None:
    """A draft costs one layer and the head: little beside 60 layers, much beside two."""
    parts = drafts.Parts(layers=2.0, head=1.0, layers_of_two=2.0, head_of_two=1.0, draft=2.0)
    assert parts.speedup(2, 2, acceptance=0.8) == pytest.approx(1.8 * 3 / 5)
    assert parts.speedup(2, 60, acceptance=0.8) == pytest.approx(1.8 * 61 / 63)


def test_v3_as_published_brings_what_was_published() -> None:
    v3 = ModelConfig.preset("v3-671b")
    assert drafts.memory_bound_speedup(v3, 0.85) == pytest.approx(1.77, abs=0.01)
    assert drafts.memory_bound_speedup(v3, 0.90) == pytest.approx(1.82, abs=0.01)
