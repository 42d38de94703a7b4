"""The longest run, at every stage of the paper's schedule, with the spike guard off."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from leanseek.pages import COLORS
from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import named
from leanseek.reproduce.results import Found, Run
from leanseek.training import RunConfig
from leanseek.training.metrics import read_rows

NEIGHBOURS = 64  # losses before a step that it is compared with
SPIKE = 10.0  # their robust deviations above their median: what the guard would call a spike


def measure(run: RunConfig, folder: Path, quick: bool) -> dict[str, Any]:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    losses = [row["loss"] for row in rows]
    jumps = [_jump(losses[i - NEIGHBOURS : i], losses[i]) for i in range(NEIGHBOURS, len(losses))]
    norms = [row["grad_norm"] for row in rows]
    width = max(1, len(norms) // 200)
    return {
        "largest_jump": max(jumps),
        "skipped": sum(row.get("event") == "skipped" for row in read_rows(folder / "metrics.jsonl")),
        "grad_norms": [max(norms[i : i + width]) for i in range(0, len(norms), width)],
        "largest_norm_after_warmup": max(norms[run.schedule.warmup_steps :]),
    }


def _jump(before: list[float], loss: float) -> float:
    """How many robust deviations a loss lies above the ones before it."""
    middle = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(x - middle) for x in before)
    return (loss - middle) / max(deviation, 1e-9)


def jump(run: Run) -> float:
    return float(run.measured["largest_jump"])


def judge(found: Found) -> Verdict:
    jumps = found.each("schedule", jump)
    skipped = sum(found.each("schedule", lambda run: run.measured["skipped"]))
    word = "held" if max(jumps) < SPIKE and not skipped else "contradicted"
    ours = (
        f"The largest jump of the loss above the {NEIGHBOURS} steps before it: {max(jumps):.1f} robust deviations (a "
        f"spike is {SPIKE:.0f}); {skipped:.0f} steps skipped."
    )
    run = found.claim.arms["schedule"]
    norm = max(found.each("schedule", lambda r: float(r.measured["largest_norm_after_warmup"])))
    text = (
        f"{run.train.steps:,} steps through every stage of section 4.2: warm-up, constant, cosine, two constant ends, "
        f"a growing batch, MTP's weight falling, the bias freezing. The guard that would skip a step is off. The "
        f"largest gradient norm after the warm-up: {norm:.2f} (clipped to {run.optimizer.clip:g})."
    )
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    for seed, color in zip(found.seeds, COLORS, strict=False):
        run = found.runs["schedule"][seed]
        left.plot(*zip(*run.loss, strict=True), linewidth=0.9, label=f"seed {seed}", color=color, alpha=0.7)
        norms = run.measured["grad_norms"]
        steps = [(i + 1) * found.claim.arms["schedule"].train.steps / len(norms) for i in range(len(norms))]
        right.plot(steps, norms, linewidth=0.9, color=color, alpha=0.7)
    named(left, "step", "training loss")
    named(right, "step", "gradient norm, largest of each window", legend=False)
