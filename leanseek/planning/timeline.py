"""Timelines of pipelines as pictures: what a plan says, and beside it what a run recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leanseek.config import ConfigError
from leanseek.planning.schedules import Timeline, Times, bubble, build, simulate
from leanseek.plotting import Axes, Figure, Patch, matplotlib

INK = "#7b8494"  # readable on white and on black
KINDS = {
    "F": ("#3b82f6", "F forward"),
    "B": ("#10b981", "B backward"),
    "I": ("#f59e0b", "I gradients of inputs"),
    "W": ("#a855f7", "W gradients of weights"),
}
STYLE: Any = {
    "svg.hashsalt": "leanseek",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
}  # small files, all alike
NUMBERED = 1200  # boxes of a chart, at most, that carry the number of their micro-batch


def draw_schedule(name: str, ranks: int, micro_batches: int, out: Path, times: Times | None = None) -> Path:
    """Draw the timeline of the schedule `name` into `out`; returns `out`.

    Raises:
        ConfigError: there is no such schedule, or it needs more micro-batches, or `out` is neither SVG nor PNG.
    """
    schedule = build(name, ranks, micro_batches)
    title = f"{name}, {ranks} ranks, {micro_batches} micro-batches"
    return draw({title: simulate(schedule, times)}, out)


def draw(charts: Mapping[str, Timeline], out: Path) -> Path:
    """Draw timelines below each other, each under its title, into `out`, SVG or PNG by its ending; returns `out`.

    A row is a rank, a box an action with the number of its micro-batch; a forward above a backward is a pair. Where
    a rank holds two stages, boxes of the second are pale.

    Raises:
        ConfigError: `out` is neither SVG nor PNG.
    """
    if out.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"{out}: a timeline is drawn into a file that ends in .svg or .png")
    rows = [len(timeline) for timeline in charts.values()]
    kinds = {a.kind for timeline in charts.values() for own in timeline for span in own for a in span.step}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 0.5 + sum(0.9 + 0.3 * n for n in rows)), layout="constrained", facecolor="none")
        axes = figure.subplots(len(charts), height_ratios=[2 + n for n in rows], squeeze=False)[:, 0]
        for ax, (title, timeline) in zip(axes, charts.items(), strict=True):
            ax.set_title(f"{title}: {bubble(timeline):.1%} of the time idle", fontsize=10, loc="left", color=INK)
            _chart(ax, timeline)
        patches = [Patch(color=color, label=label) for kind, (color, label) in KINDS.items() if kind in kinds]
        figure.legend(handles=patches, loc="outside lower right", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
        figure.savefig(out, dpi=110, metadata={"Date": None} if out.suffix.lower() == ".svg" else None)
    return out


def _chart(ax: Axes, timeline: Timeline) -> None:
    begin, end = min(own[0].start for own in timeline), max(own[-1].end for own in timeline)
    numbered = sum(map(len, timeline)) <= NUMBERED
    boxes: dict[tuple[str, bool, float, float], list[tuple[float, float]]] = {}
    for rank, own in enumerate(timeline):
        for step, start, stop in own:
            for place, action in enumerate(step):
                height = 0.9 / len(step)
                bottom = rank - 0.45 + place * height
                like = KINDS[action.kind][0], action.stage >= len(timeline), bottom, height
                boxes.setdefault(like, []).append((start - begin, stop - start))
                if numbered and (stop - start) * 240 > (end - begin):
                    middle = start - begin + (stop - start) / 2, bottom + height / 2
                    ax.text(*middle, str(action.micro), ha="center", va="center", fontsize=11 * height**0.5 - 2)
    for (color, pale, bottom, height), spans in boxes.items():
        alpha = 0.45 if pale else 0.9
        ax.broken_barh(spans, (bottom, height), facecolor=color, alpha=alpha, edgecolor="white", linewidth=0.4)
    ax.set(xlim=(0, end - begin), ylim=(len(timeline) - 0.5, -0.5), yticks=range(len(timeline)))
    ax.set_yticklabels([f"rank {rank}" for rank in range(len(timeline))])
    ax.set_facecolor("none")
    ax.tick_params(colors=INK, labelsize=8, length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
