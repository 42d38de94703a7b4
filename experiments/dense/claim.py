"""A mixture of experts against dense networks with its activated and with its total parameters."""

from __future__ import annotations

from itertools import pairwise

from leanseek import planning
from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import BITS, curves, dots
from leanseek.reproduce.results import Found, Interval, Run, bits, interval


def flops(found: Found, arm: str, tokens: float) -> float:
    run = found.claim.arms[arm]
    return tokens * planning.train_flops_per_token(run.model, run.data.seq_len)


def ratio(found: Found, dense: str) -> Interval:
    """FLOPs at which the mixture reaches the lowest loss that both reach, over the dense network's, seed by seed."""
    each = []
    for seed in found.seeds:
        moe, other = found.runs["moe"][seed], found.runs[dense][seed]
        target = max(bits(moe), bits(other))
        each.append(flops(found, "moe", _reached(moe, target)) / flops(found, dense, _reached(other, target)))
    return interval(each)


def _reached(run: Run, target: float) -> float:
    """Tokens at which the curve comes down to `target`, between evaluations in a straight line."""
    for (_, before, _, high), (_, after, _, low) in pairwise(run.curve):
        if low <= target:
            return before + (after - before) * min(1.0, max(0.0, (high - target) / (high - low)))
    return run.curve[-1][1]


def judge(found: Found) -> Verdict:
    same, total = ratio(found, "dense-activated"), ratio(found, "dense-total")
    lower = found.difference("moe", "dense-activated", bits)
    word = (
        "held"
        if lower.sign < 0 and total.high < 1
        else "held in part"
        if lower.sign < 0 or total.high < 1
        else ("contradicted" if lower.sign > 0 else "not seen at this scale")
    )
    ours = (
        f"FLOPs to equal loss: {same} of those of the dense network with as many activated parameters, {total} of "
        f"those of the one with as many in all. Bits per byte: {found.listed(bits)}."
    )
    text = (
        f"The mixture has 5.8 M parameters, of which a token passes 3.1 M, a quarter of them embedding and head; V3's "
        f"share is 1 in 18, so a tenth of the FLOPs is not to be had here. At equal FLOPs per token its bits per byte "
        f"less the dense network's: {lower}."
    )
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    curves(left, found, x=lambda arm, tokens: flops(found, arm, tokens) / 1e12, label="TFLOP of training")
    dots(right, found, bits, BITS)
