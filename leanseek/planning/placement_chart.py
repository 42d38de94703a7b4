"""A picture of a placement: the load of each GPU before and after."""

from __future__ import annotations

from pathlib import Path

from leanseek.planning.placement import Rows
from leanseek.plotting import Figure, matplotlib

BEFORE, AFTER, INK = "#9ca3af", "#3b82f6", "#7b8494"


def draw_placement(out: Path, layers: list[int], before: Rows, after: Rows, title: str) -> None:
    """Writes a picture (PNG, SVG or PDF by its name) of GPU loads [layers, gpus], each as a multiple of the mean.

    On the left the layer that was most uneven; on the right the busiest GPU of every layer.

    Raises:
        ValueError: matplotlib does not know the name's ending.
        OSError: the file cannot be written.
    """
    peaks = [[max(_relative(row)) for row in rows] for rows in (before, after)]
    worst = max(range(len(layers)), key=peaks[0].__getitem__)
    with matplotlib.rc_context({"svg.hashsalt": "leanseek"}):
        figure = Figure(figsize=(11, 3.4), layout="constrained", facecolor="white")
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        gpus, by_layer = figure.subplots(1, 2)
        for row, color, label in ((before[worst], BEFORE, "in order"), (after[worst], AFTER, "placed by load")):
            gpus.stairs(sorted(_relative(row), reverse=True), fill=True, color=color, alpha=0.8, label=label)
        gpus.set_title(f"layer {layers[worst]}: load of each GPU, 1 = the mean", fontsize=10, loc="left", color=INK)
        gpus.set_xlabel("GPUs by falling load", fontsize=9, color=INK)
        for peak, color, label in zip(peaks, (BEFORE, AFTER), ("in order", "placed by load"), strict=True):
            by_layer.plot(layers, peak, "o-", color=color, markersize=3, linewidth=1.2, label=label)
        by_layer.set_title("busiest GPU of each layer, 1 = the mean", fontsize=10, loc="left", color=INK)
        by_layer.set_xlabel("layer", fontsize=9, color=INK)
        for ax in (gpus, by_layer):
            ax.set_ylim(bottom=0)
            ax.axhline(1.0, color=INK, linewidth=0.8, linestyle="--")
            ax.grid(True, axis="y", color=INK, alpha=0.18, linewidth=0.6)
            ax.tick_params(colors=INK, labelsize=9)
            ax.legend(fontsize=8, frameon=False)
            for side, spine in ax.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(INK)
        figure.savefig(out, dpi=110, metadata={"Date": None} if out.suffix == ".svg" else None)


def _relative(row: list[float]) -> list[float]:
    mean = sum(row) / len(row) or 1.0
    return [x / mean for x in row]
