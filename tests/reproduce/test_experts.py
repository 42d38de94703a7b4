"""The redundancy test and specialisation by domain, of a run that has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from leanseek.data.formats import DataError
from leanseek.data.loader import TokenDataset
from leanseek.errors import InputError
from leanseek.model import Transformer
from leanseek.reproduce import experts
from leanseek.training import RunConfig
from leanseek.training.metrics import read_rows


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1}])
def test_the_best_experts_give_their_place_to_the_next_ones(
    tiny_model: Callable[..., Transformer], changes: dict, count: int
) -> None:
    """By each token, of those that the gate would have chosen; with node limits and without."""
    model = tiny_model(**changes, topk_group=1 if changes else 2)
    tokens = torch.randint(0, 96, (2, 9))
    _, (before, *_) = model.hidden(tokens)
    with experts.without_best(model, count):
        _, (after, *later) = model.hidden(tokens)
    _, (again, *_) = model.hidden(tokens)
    assert torch.equal(before.indices, again.indices) and later
    bias = model.layers[1].mlp.gate.e_score_correction_bias
    for scores, chosen, found in zip(before.scores, before.indices, after.indices, strict=True):
        best = sorted(chosen.tolist(), key=lambda e: -scores[e])[:count]
        rest = (scores if bias is None else scores + bias).clone()
        rest[best] = -torch.inf
        if not changes:  # the two best groups of two
            groups = rest.view(4, 2).sum(-1).topk(2).indices.tolist()
            rest[[e for e in range(8) if e // 2 not in groups]] = -torch.inf
        assert set(found.tolist()) == set(rest.topk(3).indices.tolist())
    assert torch.allclose(after.weights.sum(-1), torch.full((18,), 2.5), atol=1e-5)


def test_experts_that_are_not_there_cannot_be_left_out(tiny_model: Callable[..., Transformer]) -> None:
    with pytest.raises(ValueError, match="4 of 3"), experts.without_best(tiny_model(), 4):
        pass


def test_without_nothing_the_loss_is_that_of_training(ended: tuple[RunConfig, Path]) -> None:
    found = experts.redundancy(*ended)
    trained = [row for row in read_rows(ended[1] / "metrics.jsonl") if row.get("val_bits_per_byte")]
    assert found["none"] == pytest.approx(trained[-1]["val_bits_per_byte"], rel=1e-4)
    assert found["best"] > found["none"]
    assert found["eighth"] == found["best"]  # one of eight


def test_bits_that_an_expert_tells_about_the_domain() -> None:
    apart = torch.eye(2, dtype=torch.float64)[:, None]  # [domains, layers, E]
    alike = torch.full((3, 2, 4), 0.25, dtype=torch.float64)
    assert experts.mutual_information(apart) == 1.0
    assert experts.mutual_information(alike) == 0.0
    assert experts.mutual_information(torch.cat((apart, torch.full((2, 1, 2), 0.5)), 1)) == 0.5


def test_domains_are_read_from_the_held_out_documents(ended: tuple[RunConfig, Path]) -> None:
    shards = Path(ended[0].data.path)
    found = experts.held_out_by_domain(shards, 320)
    assert list(found) == ["verse and drama", "Perl manual"]
    stored = TokenDataset(shards, "validation", 320)
    assert np.array_equal(found["verse and drama"], stored.shards[0][:320])  # hamlet_gut is the first file
    assert not set(found["Perl manual"].tolist()) <= set(found["verse and drama"].tolist())
    with pytest.raises(InputError, match="no domain with 1,000,000"):
        experts.held_out_by_domain(shards, 10**6)


def test_load_by_domain(ended: tuple[RunConfig, Path]) -> None:
    found = experts.specialisation(*ended, windows=8)
    loads = torch.tensor(list(found["load"].values()))
    assert loads.shape == (2, 2, 8)  # domains, MoE layers of the main model, experts
    assert torch.allclose(loads.mean(-1), torch.ones(2, 2), atol=1e-2)
    assert 0.01 < found["bits"] <= 1


def test_a_corpus_that_has_changed_is_refused(ended: tuple[RunConfig, Path], tmp_path: Path) -> None:
    run, folder = ended
    for name in ("settings.json", "tokenizer.json", "tokenizer_config.json"):
        text = (Path(run.data.path) / name).read_text()
        (tmp_path / name).write_text(text.replace("texts/hamlet_gut", "texts/another_gut"))
    moved = dataclasses.replace(run, data=dataclasses.replace(run.data, path=str(tmp_path)))
    with pytest.raises(DataError, match=r"another_gut\.jsonl, from which .* is missing or has changed"):
        experts.specialisation(moved, folder, windows=8)
