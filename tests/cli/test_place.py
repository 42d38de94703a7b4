"""`leanseek place`: recorded loads in, a file for an engine and a picture out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from leanseek import ModelConfig
from leanseek.cli import main
from leanseek.planning import place_experts

LOAD = [[0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], [0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4]]
SIZES = ("--replicas", "12", "--gpus", "4")


def leanseek(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["leanseek", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of a dense layer, two with experts (the second the MTP module's), and twelve recorded steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    model = {"vocab_size": 64, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2,
             "topk_group": 1, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}  # fmt: skip
    ModelConfig.from_dict(model)
    (folder / "config.toml").write_text("[model]\n" + "".join(f"{k} = {v}\n" for k, v in model.items()), "utf-8")
    untrained = {"step": 1, "load": {"1": [1.0] + [0.0] * 7, "2": [1.0] + [0.0] * 7}}
    trained = {"step": 2, "load": {"1": LOAD[0], "2": LOAD[1]}}
    rows = [untrained] * 2 + [trained] * 10 + [{"step": 13, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def test_a_run_is_placed_for_sglang(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "placement.json", tmp_path / "placement.svg"
    assert (
        leanseek(monkeypatch, "place", str(run), *SIZES, "--nodes", "2", "--out", str(out), "--plot", str(picture)) == 0
    )
    text = capsys.readouterr().out
    assert "mean over the last 10 recorded steps" in text and "hierarchical" in text
    assert "not in the file, MTP layers: 2" in text
    assert f"--ep-num-redundant-experts 4 --init-expert-location {out}" in text
    [expected] = place_experts([LOAD[0]], 12, 2, 2, 4)
    assert json.loads(out.read_text("utf-8")) == {"physical_to_logical_map": [[*range(8), 0, 1, 2, 3], expected]}
    assert "<svg" in picture.read_text("utf-8")


def test_counts_in_a_file_are_added_over_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = [[[0] * 8, [40, 10, 10, 10, 0, 0, 0, 0]], [[0] * 8, [0, 0, 0, 0, 10, 10, 5, 5]]]
    given, out = tmp_path / "counts.json", tmp_path / "out.json"
    given.write_text(json.dumps({"logical_count": counts}), "utf-8")
    assert leanseek(monkeypatch, "place", str(given), *SIZES, "--format", "vllm", "--out", str(out), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text("utf-8")) == place_experts([LOAD[0]], 12, 1, 1, 4)
    assert "1 without tokens are taken as dense" in found["loads"] and found["repeats"] == 0
    assert found["max_over_mean"]["1"]["after"] < found["max_over_mean"]["1"]["before"]


def test_counts_of_copies_in_a_file_are_added_per_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0]
    counts = [8, 10, 10, 10, 10, 10, 5, 5, 8, 8, 8, 8]
    given, out = tmp_path / "counts.json", tmp_path / "out.json"
    given.write_text(json.dumps({"physical_count": [counts], "physical_to_logical_map": [slots]}), "utf-8")
    assert leanseek(monkeypatch, "place", str(given), *SIZES, "--format", "vllm", "--out", str(out)) == 0
    assert json.loads(out.read_text("utf-8")) == place_experts([LOAD[0]], 12, 1, 1, 4)


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ({}, (), "neither logical_count nor physical_count"),
        ({"physical_count": [[1, 2]]}, (), "neither logical_count nor physical_count"),
        ({"physical_count": [[1, 2]], "physical_to_logical_map": [[0, -1]]}, (), "name an expert for each slot"),
        ({"physical_count": [[1, 2]], "physical_to_logical_map": [[0, 1], [1, 0]]}, (), "name an expert for each slot"),
        ({"physical_count": [[1, 2]], "physical_to_logical_map": [[0, 1, 2]]}, (), "2 counts for 3 slots"),
        ({"logical_count": [1, 2]}, (), "[layers, experts]"),
        ({"logical_count": [[1, "x"]]}, (), "[layers, experts]"),
        ({"logical_count": [[0, 0]]}, (), "counts no tokens"),
        ({"logical_count": [[1] * 8]}, ("--gpus", "5"), "do not divide over 5 GPUs"),
        ({"logical_count": [[1] * 8]}, ("--format", "trt"), "not one of sglang, vllm, vllm-ascend"),
        ({"logical_count": [[1] * 8]}, ("--plot", "x.gif"), "must end in .png"),
        ({"logical_count": [[1] * 8]}, ("--out", "/no/such/folder/x.json"), "cannot be written"),
        (None, (), "no recorded loads"),
    ],
)
def test_bad_input_is_one_line(
    content: dict[str, Any] | None,
    options: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path if content is None else tmp_path / "counts.json"
    if content is not None:
        source.write_text(json.dumps(content), "utf-8")
    out = tmp_path / "out.json"
    assert leanseek(monkeypatch, "place", str(source), *SIZES, "--out", str(out), *options) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not out.exists()
