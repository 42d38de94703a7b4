"""What the pictures of claims have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from leanseek.pages import COLORS, INK, quiet
from leanseek.plotting import Axes
from leanseek.reproduce.results import Found, Run

BITS = "bits per byte, validation"


def color(found: Found, arm: str) -> str:
    return COLORS[list(found.runs).index(arm) % len(COLORS)]


def curves(
    ax: Axes,
    found: Found,
    arms: Iterable[str] | None = None,
    x: Callable[[str, float], float] = lambda arm, tokens: tokens / 1e6,
    label: str = "million tokens",
) -> None:
    """Bits per byte against tokens, or `x(arm, tokens)`: the mean over seeds, in a band from the least to the most."""
    for arm in arms or found.runs:
        runs = [found.runs[arm][seed].curve for seed in found.seeds]
        points = list(zip(*runs, strict=True))[1:]  # the first evaluation, barely trained, would flatten the rest
        xs = [x(arm, point[0][1]) for point in points]
        values = [[row[3] for row in point] for point in points]
        ax.plot(xs, [sum(v) / len(v) for v in values], color=color(found, arm), linewidth=1.7, label=arm)
        ax.fill_between(xs, [min(v) for v in values], [max(v) for v in values], color=color(found, arm), alpha=0.18)
    named(ax, label, BITS)


def dots(ax: Axes, found: Found, figure: Callable[[Run], float], label: str, arms: Iterable[str] | None = None) -> None:
    """A figure of every seed, arm by arm, with the mean and its 95 % interval."""
    chosen = list(arms or found.runs)
    for place, arm in enumerate(chosen):
        found_mean, values = found.mean(arm, figure), found.each(arm, figure)
        ax.scatter([place] * len(values), values, color=color(found, arm), s=22, alpha=0.75, linewidths=0)
        ax.plot([place - 0.2, place + 0.2], [found_mean.mean] * 2, color=color(found, arm), linewidth=2)
        if len(values) > 1:
            ax.vlines(place, found_mean.low, found_mean.high, color=color(found, arm), linewidth=1)
    named(ax, "", label, legend=False)
    ax.set_xticks(
        range(len(chosen)), chosen, rotation=25 if len(chosen) > 4 else 0, ha="right" if len(chosen) > 4 else "center"
    )
    ax.set_xlim(-0.6, len(chosen) - 0.4)


def named(ax: Axes, x: str, y: str, legend: bool = True) -> None:
    quiet(ax)
    ax.set_xlabel(x, color=INK, fontsize=9)
    ax.set_ylabel(y, color=INK, fontsize=9)
    if legend:
        ax.legend(frameon=False, fontsize=9, labelcolor=INK)
