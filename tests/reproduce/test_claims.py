"""The claims that are measured without a run: what they time agrees, and a verdict can be drawn of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leanseek.pages import drawn
from leanseek.reproduce.claims import find_claims
from leanseek.reproduce.report import judge
from leanseek.reproduce.results import add
from leanseek.reproduce.runner import results_path
from leanseek.reproduce.worker import work


@pytest.mark.parametrize("rows", [1, 24])
def test_both_ways_of_a_baseline_and_both_forms_of_mla_are_the_same_attention(rows: int) -> None:
    (claim,) = find_claims(["absorbed-mla"])
    forms = claim.script._forms(96, rows, torch.float32)
    absorbed, expanded = (forms[name][0][0]() for name in ("MLA absorbed", "MLA expanded"))
    assert absorbed.shape == (16, 1, rows, 128)
    assert torch.allclose(absorbed, expanded, rtol=1e-3, atol=1e-4)
    for name, heads in claim.script.KEY_HEADS.items():
        fused, kernel = (call() for call in forms[name][0])
        assert fused.shape == (heads, 16 // heads, rows, 128)
        assert torch.allclose(fused, kernel, rtol=1e-3, atol=1e-4), name
        assert forms[name][1] == 2 * heads * 96 * 128 * 4


@pytest.mark.parametrize("name", ["absorbed-mla", "cost"])
def test_verdict_and_picture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (claim,) = find_claims([name], quick=True)
    if name == "absorbed-mla":
        for constant, value in {"CONTEXTS": (64, 128), "CHUNK": 16, "SECONDS": 0.001}.items():
            monkeypatch.setattr(claim.script, constant, value)
    for seed in (0, 1):
        add(results_path(claim, tmp_path), work([(claim, "")], seed, tmp_path / name, quick=True))
    judged = judge(claim, tmp_path)
    assert judged.found.seeds == [0, 1]
    assert "nan" not in (judged.verdict.ours + judged.verdict.text).lower()
    assert drawn(judged.figure()).startswith("<svg")


def test_the_published_rates_give_the_published_bill() -> None:
    (claim,) = find_claims(["cost"])
    found = claim.script.measure(None, None, False)
    assert found["hours"]["total"] == 2_788_000 and found["dollars"] == 5_576_000
    assert 0.85 < found["planned_hours"] / found["hours"]["pre-training"] < 1
    assert found["hours_of"]["V3 671B"] == pytest.approx(found["hours"]["pre-training"])
