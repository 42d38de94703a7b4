"""Coarse experts, fine ones, fine ones with a shared one: equal parameters and FLOPs."""

from __future__ import annotations

from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import BITS, curves, dots
from leanseek.reproduce.results import Found, Run


def bits(run: Run) -> float:
    return run.bits


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
    ours = f"Bits per byte: {', '.join(f'{arm} {found.mean(arm, bits)}' for arm in found.runs)}."
    text = (
        f"8 choose 2, 32 choose 8, and 31 choose 7 with one shared, of equal parameters and FLOPs. Fine less coarse: "
        f"{finer}; fine with a shared expert less coarse: {shared}; the shared one alone: "
        f"{found.difference('fine-shared', 'fine', bits)}."
    )
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    dots(left, found, bits, BITS)
    curves(right, found)
