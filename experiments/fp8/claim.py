"""FP8 against BF16: by tiles and blocks as the paper, and by one scale for a whole tensor."""

from __future__ import annotations

from leanseek.pages import INK
from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import BITS, color, dots, named
from leanseek.reproduce.results import Found, Interval, bits, interval

WANTED = 0.0025  # of the loss (3.3)


def relative(found: Found, arm: str) -> Interval:
    pairs = zip(found.each(arm, bits), found.each("bf16", bits), strict=True)
    return interval([a / b - 1 for a, b in pairs])


def judge(found: Found) -> Verdict:
    error = {arm: relative(found, arm) for arm in found.runs if arm != "bf16"}
    own = error["fp8"]
    word = (
        "held" if max(abs(own.low), abs(own.high)) < WANTED
        else "contradicted" if own.low > WANTED
        else "held in part" if abs(own.mean) < WANTED
        else "not seen at this scale"
    )  # fmt: skip
    ours = "Relative error of bits per byte: " + ", ".join(f"{arm} {e:+.2%}" for arm, e in error.items()) + "."
    text = (
        "The same network, text and seeds in BF16 and in FP8. The curves of two runs part by rounding alone and then "
        "differ by chance, so the error is a mean over seeds. A longer run of a larger network, with planted outliers, "
        "is in long/."
    )
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    for arm in found.runs:
        if arm != "bf16":
            for seed in found.seeds:
                own, reference = found.runs[arm][seed].loss, found.runs["bf16"][seed].loss
                steps = [step for step, _ in own]
                errors = [100 * (a / b - 1) for (_, a), (_, b) in zip(own, reference, strict=True)]
                ax_label = arm if seed == found.seeds[0] else None
                left.plot(steps, errors, color=color(found, arm), linewidth=0.9, alpha=0.8, label=ax_label)
    for limit in (-100 * WANTED, 100 * WANTED):
        left.axhline(limit, color=INK, linewidth=0.8, linestyle="--")
    named(left, "step", "relative error of the training loss, %")
    dots(right, found, bits, BITS)
