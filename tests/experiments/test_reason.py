"""`make reason` from end to end at a tiny scale: every arm, resumed where it was, and its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest

from leanseek.reproduce import results


@pytest.mark.slow
def test_every_arm_from_end_to_end(reason: dict[str, ModuleType], tmp_path: Path) -> None:
    run = reason["run"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "hamlet.txt").write_text("To be, or not to be: that is the question.\n\n" * 200)
    small = ("model.hidden_size=32", "model.intermediate_size=48", "model.moe_intermediate_size=16")
    scale = run.Scale(
        sizes={"traces": 60, "text": 2000, "sft": 24, "rl": 16, "distil": 4, "test": 4, "dev": 4},
        pairs=(12, 4),
        answers=2,
        developing=2,
        more={
            "pretrain": (*small, "train.steps=2", "train.batch_size=2", "train.eval_sequences=1"),
            "reward": ("schedule.warmup_steps=0",),
            "grpo": ("train.steps=2", "train.batch_size=4", "grpo.group=2", "grpo.max_tokens=8", "train.eval_every=1"),
        },
    )
    out, home = tmp_path / "results.json", tmp_path / "runs"
    arms = ("grpo", "random", "model", "mixture", "short")  # an untrained model answers nothing right to distil
    run.tell(tmp_path / "texts", home, [0], arms, out, scale)
    rows = results.read(out)
    assert [row.arm for row in rows] == ["sft", *arms]
    assert {"reward", "reward/coin", "reward/answer", "long"} <= rows[2].measured["curves"].keys()
    assert [step for step, _ in rows[1].curve] == [1, 2]

    stamps = {path: path.stat().st_mtime_ns for path in home.rglob("metrics.jsonl")}
    run.tell(tmp_path / "texts", home, [0], arms, out, scale)  # all is there
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert results.read(out) == rows
    other = dataclasses.replace(scale, answers=3)
    with pytest.raises(SystemExit, match="holds runs of another recipe of sft, grpo: move it away"):
        run.tell(tmp_path / "texts", home, [0], ("grpo",), out, other)

    run.write_page(rows, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "after SFT" in page and "GRPO, random reward" in page and page.count("<svg") == 7
