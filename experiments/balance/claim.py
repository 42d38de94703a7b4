"""What keeps experts balanced, and what it costs: nothing, the bias, auxiliary losses."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from leanseek.pages import INK
from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import BITS, dots, named
from leanseek.reproduce.experts import specialisation
from leanseek.reproduce.results import Found, Run, bits
from leanseek.training import RunConfig
from leanseek.training.metrics import read_rows

AUXILIARY = ("sequence-weak", "sequence-strong", "switch")


def violation(run: Run) -> float:
    return float(run.measured["max_violation"])


def told(run: Run) -> float:
    return float(run.measured["specialisation"]["bits"])


def measure(run: RunConfig, folder: Path, quick: bool) -> dict[str, Any]:
    """Max violation of the worst layer, mean of the last tenth of the steps; and which text each expert serves."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "max_violation" in row]
    last = rows[-max(1, len(rows) // 10) :]
    violation = statistics.fmean(row["max_violation"] for row in last)
    return {"max_violation": violation, "specialisation": specialisation(run, folder)}


def judge(found: Found) -> Verdict:
    against = {arm: found.difference("bias", arm, bits) for arm in (*AUXILIARY, "batch-wise", "none")}
    balance = found.difference("bias", "none", violation).sign
    signs = [against[arm].sign for arm in AUXILIARY]
    word = (
        "contradicted" if 1 in signs or balance > 0
        else "held" if balance < 0 and all(sign < 0 for sign in signs)
        else "held in part" if -1 in signs
        else "not seen at this scale"
    )  # fmt: skip
    ours = f"Bits per byte: {found.listed(bits)}. Max violation: {found.listed(violation)}."
    text = (
        "The bias's bits per byte less those of each other: "
        + "; ".join(f"{arm} {difference}" for arm, difference in against.items())
        + ". What an expert's number tells of the domain of its text, in bits: "
        + ", ".join(f"{arm} {found.mean(arm, told)}" for arm in found.runs)
        + f" (bias less sequence-strong: {found.difference('bias', 'sequence-strong', told)}). Max violation is the "
        "worst layer's, averaged over the last tenth of the steps (bias less sequence-strong: "
        f"{found.difference('bias', 'sequence-strong', violation)})."
    )
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    figure.set_size_inches(11, 6)
    rows = figure.subfigures(2, 1, height_ratios=[1, 1])
    left, middle, right = rows[0].subplots(1, 3)
    dots(left, found, bits, BITS)
    dots(middle, found, violation, "max violation")
    dots(right, found, told, "bits an expert tells of the domain")
    arms = ("bias", "sequence-strong")
    for ax, arm in zip(rows[1].subplots(1, 2, sharey=True), arms, strict=True):
        load = found.runs[arm][found.seeds[0]].measured["specialisation"]["load"]
        image = ax.imshow([layers[-1] for layers in load.values()], aspect="auto", cmap="viridis", vmin=0, vmax=4)
        ax.set_yticks(range(len(load)), load)
        named(ax, f"expert of the last layer, {arm}", "", legend=False)
        ax.grid(False)
    bar = rows[1].colorbar(image, ax=rows[1].axes, pad=0.01)
    bar.set_label("load, 1 = an equal share", color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=INK)
