"""Coarse experts, fine ones, fine ones with a shared one: equal parameters and FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import BITS, curves, dots
from leanseek.reproduce.experts import redundancy
from leanseek.reproduce.results import Found, Run, bits
from leanseek.training import RunConfig


def measure(run: RunConfig, folder: Path, quick: bool) -> dict[str, Any]:
    return redundancy(run, folder)


def lost(run: Run) -> float:
    """Bits per byte that go when each token's best eighth of the experts is switched off."""
    return float(run.measured["eighth"] - run.measured["none"])


def judge(found: Found) -> Verdict:
    finer = found.difference("fine", "coarse", bits)
    shared = found.difference("fine-shared", "coarse", bits)
    signs = (finer.sign, shared.sign)
    word = (
        "contradicted" if max(signs) > 0
        else "held" if signs == (-1, -1)
        else "held in part" if -1 in signs
        else "not seen at this scale"
    )  # fmt: skip
    ours = f"Bits per byte: {found.listed(bits)}."
    text = (
        f"8 choose 2, 32 choose 8, and 31 choose 7 with one shared, of equal parameters and FLOPs. Fine less coarse: "
        f"{finer}; fine with a shared expert less coarse: {shared}; the shared one alone: "
        f"{found.difference('fine-shared', 'fine', bits)}. "
        f"With each token's best eighth of the experts switched off, the loss rises by "
        + ", ".join(f"{found.mean(arm, lost)} ({arm})" for arm in found.runs)
        + " bits per byte: the more, the less can others stand in for them."
    )
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    left, middle, right = figure.subplots(1, 3)
    dots(left, found, bits, BITS)
    dots(middle, found, lost, "bits per byte lost without the best eighth")
    curves(right, found)
