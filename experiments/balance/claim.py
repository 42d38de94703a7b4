"""What keeps experts balanced, and what it costs: nothing, the bias, auxiliary losses."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import BITS, dots
from leanseek.reproduce.results import Found, Run
from leanseek.training import RunConfig
from leanseek.training.metrics import read_rows

AUXILIARY = ("sequence-weak", "sequence-strong", "switch")


def bits(run: Run) -> float:
    return run.bits


def violation(run: Run) -> float:
    return float(run.measured["max_violation"])


def measure(run: RunConfig, folder: Path, quick: bool) -> dict[str, Any]:
    """Max violation of the worst layer, mean of the last tenth of the steps."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "max_violation" in row]
    last = rows[-max(1, len(rows) // 10) :]
    return {"max_violation": statistics.fmean(row["max_violation"] for row in last)}


def judge(found: Found) -> Verdict:
    against = {arm: found.difference("bias", arm, bits) for arm in (*AUXILIARY, "batch-wise", "none")}
    balanced = found.difference("bias", "none", violation).sign < 0
    signs = [against[arm].sign for arm in AUXILIARY]
    word = (
        "contradicted" if 1 in signs or not balanced
        else "held" if all(sign < 0 for sign in signs)
        else "held in part" if -1 in signs
        else "not seen at this scale"
    )  # fmt: skip
    ours = (
        f"Bits per byte: {', '.join(f'{arm} {found.mean(arm, bits)}' for arm in found.runs)}. "
        f"Max violation: {', '.join(f'{arm} {found.mean(arm, violation)}' for arm in found.runs)}."
    )
    text = (
        "The bias's bits per byte less those of each other: "
        + "; ".join(f"{arm} {difference}" for arm, difference in against.items())
        + ". Max violation is the worst layer's, averaged over the last tenth of the steps."
    )
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    dots(left, found, bits, BITS)
    dots(right, found, violation, "max violation")
    right.set_yscale("log")
