"""leanseek reproduce: what is missing is run once, what was cut goes on, and a difference is one only by its interval."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from leanseek.cli import app
from leanseek.config import ConfigError
from leanseek.errors import InputError, RunError
from leanseek.reproduce import claims as claims_module
from leanseek.reproduce.claims import EXPERIMENTS, Claim, find_claims, fingerprint, seeded
from leanseek.reproduce.report import judge, write_folder, write_report
from leanseek.reproduce.results import Found, add, interval
from leanseek.reproduce.runner import find_jobs, reproduce, results_path
from leanseek.reproduce.worker import work
from tests.small import forked, kill_when, run_toml

pytestmark = pytest.mark.usefixtures("quick_runs")

BASE = run_toml(
    {"vocab_size": 320, "num_nextn_predict_layers": 0, "initializer_range": 0.02},
    data={"path": "shards", "seq_len": 32},
    train={"steps": 20, "batch_size": 2, "eval_every": 5, "eval_sequences": 4},
    checkpoint={"every": 5},
)
ARMS = """
title = "one is better"
paper = "1"
[equal]
train_flops = ["plain", "balanced"]
[arms.plain]
[arms.balanced]
balance = { sequence_alpha = 0.0 }
"""
SCRIPT = """
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import curves
from leanseek.reproduce.results import bits
def measure(run, folder, quick):
    return {"steps": run.train.steps}
def judge(found):
    return Verdict("held", str(found.mean("plain", bits)), "text & more")
def draw(figure, found):
    curves(figure.subplots(), found)
"""


@pytest.fixture
def place(run_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with shards and two claims, which share the arm that changes nothing; the working directory."""
    folder = run_folder("")
    experiments = folder / "experiments"
    for name in ("first", "second"):
        (experiments / name).mkdir(parents=True)
        (experiments / name / "arms.toml").write_text(ARMS)
        (experiments / name / "claim.py").write_text(SCRIPT)
    (experiments / "second/arms.toml").write_text('title = "t"\npaper = "p"\n[arms.base]\n')
    (experiments / "second/claim.py").write_text(SCRIPT.replace('"plain"', '"base"'))
    (experiments / "base.toml").write_text(BASE)
    monkeypatch.setattr(claims_module, "EXPERIMENTS", experiments)
    monkeypatch.chdir(folder)
    return folder


def test_what_is_missing_is_run_once(place: Path) -> None:
    """Claims share runs; a second call has nothing to do; results are added to."""
    found = find_claims([])
    jobs = find_jobs(found, Path("runs"), seeds=1)
    assert [[(c.name, arm) for c, arm in job.arms] for job in jobs] == [
        [("first", "plain"), ("second", "base")],
        [("first", "balanced")],
    ]
    _run_here(found[0], "balanced", Path("runs"))
    reproduce(found, Path("runs"), seeds=1, jobs=2)
    assert not find_jobs(found, Path("runs"), seeds=1)
    before = results_path(found[0], Path("runs")).read_bytes()
    rows = json.loads(before)["runs"]
    assert {row["arm"] for row in rows} == {"plain", "balanced"}
    assert [point[0] for point in rows[0]["curve"]] == [5, 10, 15, 20]
    assert all(row["measured"] == {"steps": 20} and row["seconds"] > 0 for row in rows)
    reproduce(found, Path("runs"), seeds=1, jobs=2)
    assert results_path(found[0], Path("runs")).read_bytes() == before
    _pages(place, found)


def _run_here(claim: Claim, arm: str, runs: Path) -> None:
    """What the runner does with a process of its own."""
    add(results_path(claim, runs), work([(claim, arm)], 0, runs / "run", claim.quick))


def _pages(place: Path, found: list[Claim]) -> None:
    judged = [judge(claim, Path("runs")) for claim in found]
    for one in judged:
        write_folder(one)
    assert (place / "experiments/first/picture.png").stat().st_size > 1000
    # the script says "held", but nothing is called by one seed
    assert "**One seed alone.**" in (place / "experiments/first/README.md").read_text()
    for name in ("page.html", "page.md"):
        write_report(judged, place / name)
    text = (place / "page.html").read_text()
    assert text.count("<svg") == 2 and "text &amp; more" in text
    assert not re.search(r'(src|href)="(?!#)', text)  # nothing is loaded from elsewhere
    with pytest.raises(InputError, match=r"must end in \.html or \.md"):
        write_report(judged, place / "page.pdf")


def test_killed_it_ends_with_the_same_numbers(place: Path) -> None:
    claim, folder = Claim(place / "experiments/first"), place / "cut"
    (whole,) = work([(claim, "plain")], 0, place / "whole", quick=False)
    kill_when(forked(lambda: work([(claim, "plain")], 0, folder, quick=False)), lambda: _steps(folder) >= 12)
    (row,) = work([(claim, "plain")], 0, folder, quick=False)
    assert row["curve"] == whole["curve"] and row["loss"] == whole["loss"]


def _steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


@pytest.mark.slow  # three processes
def test_a_failed_run_is_named_and_the_others_are_kept(place: Path) -> None:
    path = place / "experiments/first/arms.toml"
    path.write_text(path.read_text() + '[arms.broken]\ntrain = { device = "cuda:9" }\n')
    with pytest.raises(RunError, match=r"1 of 3 runs failed: first/broken seed 0: train.device = 'cuda:9'"):
        reproduce([Claim(place / "experiments/first")], Path("runs"), seeds=1, jobs=2)


def test_quick_is_a_tenth_and_leaves_the_results_alone(place: Path) -> None:
    claim = Claim(place / "experiments/second", quick=True)
    assert claim.arms["base"].train.steps == 2
    _run_here(claim, "base", Path("runs/quick"))
    assert not (place / "experiments/second/results.json").exists()
    assert judge(claim, Path("runs/quick")).found.runs["base"][0].measured == {"steps": 2}


def test_arms_that_should_be_equal_are(place: Path) -> None:
    path = place / "experiments/first/arms.toml"
    path.write_text(
        path.read_text().replace("sequence_alpha = 0.0 }", "sequence_alpha = 0.0 }\nmodel.vocab_size = 400")
    )
    with pytest.raises(ConfigError, match="plain, balanced differ in train_flops"):
        Claim(place / "experiments/first").matched()


def test_a_result_counts_for_the_arm_it_was_run_for(place: Path) -> None:
    """Another setting, another run; the old row stays in the file."""
    claim = Claim(place / "experiments/second")
    _run_here(claim, "base", Path("runs"))
    (claim.folder / "arms.toml").write_text('title = "t"\npaper = "p"\n[arms.base]\noptimizer = { lr = 1e-3 }\n')
    changed = Claim(claim.folder)
    assert not Found(changed, results_path(changed, Path("runs"))).seeds
    assert len(find_jobs([changed], Path("runs"), seeds=1)) == 1
    moved = seeded(claim.arms["base"], 0)
    assert fingerprint(moved) != fingerprint(seeded(changed.arms["base"], 0)) != fingerprint(seeded(moved, 1))


def test_a_difference_needs_its_interval() -> None:
    assert interval([1.0, 2.0, 3.0]).high == pytest.approx(2 + 4.303 / math.sqrt(3), rel=1e-4)
    assert interval([1.0, 2.0, 3.0]).sign == 0 and interval([1.0, 1.1, 1.2]).sign == 1
    assert interval([-1.0, -1.1, -1.2]).sign == -1
    assert interval([5.0]).sign == 0 and "one seed" in str(interval([5.0]))


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXPERIMENTS.glob("*/arms.toml")))
def test_the_claims_of_this_checkout(name: str, tmp_path: Path) -> None:
    """Arms are matched, and what has been found so far can be judged and drawn."""
    claim = Claim(EXPERIMENTS / name)
    claim.matched()
    assert callable(claim.script.judge) and callable(claim.script.draw)
    judged = judge(claim, tmp_path)
    write_report([judged], tmp_path / "one.html")
    assert claim.file.title in (tmp_path / "one.html").read_text()


def test_an_unknown_claim_is_refused() -> None:
    result = CliRunner().invoke(app, ["reproduce", "nonsense"])
    assert isinstance(result.exception, InputError) and "no claim 'nonsense'; there are" in str(result.exception)
