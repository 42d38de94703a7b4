"""Multi-token prediction: does it help the main loss, and are its drafts accepted?"""

from __future__ import annotations

from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import BITS, curves, dots
from leanseek.reproduce.results import Found, Run


def bits(run: Run) -> float:
    return run.bits


def judge(found: Found) -> Verdict:
    one, two = (found.difference(arm, "off", bits) for arm in ("depth-1", "depth-2"))
    word = (
        "held" if one.sign < 0
        else "contradicted" if one.sign > 0
        else "not seen at this scale"
    )  # fmt: skip
    ours = f"Bits per byte of the main model: {', '.join(f'{arm} {found.mean(arm, bits)}' for arm in found.runs)}."
    text = f"Depth 1 less off: {one}; depth 2 less off: {two}."
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    dots(left, found, bits, BITS)
    curves(right, found)
