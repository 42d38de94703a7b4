"""The pages that runs and claims write: self-contained HTML, light and dark, with charts as inline SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable

from leanseek.plotting import Axes, Figure, matplotlib

INK = "#7b8494"  # readable on white and on black
COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6")

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #6b7280; --paper: #fbfbfd; --card: #fff; --line: #e5e7eb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --soft: #9aa3b2; --paper: #0f1218; --card: #171b23; --line: #2a303c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
p { color: var(--soft); margin: .2rem 0 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.figures div, section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; }
.figures b { display: block; font-size: 1.35rem; } .figures span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr)); gap: 1rem; }
section { margin-bottom: 1rem; } .charts section { margin: 0; } .wide { grid-column: 1 / -1; }
svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .35rem .5rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr + tr td { border-top: 1px solid var(--line); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 14px/1.5 ui-monospace, monospace; }
"""


def quiet(ax: Axes) -> None:
    ax.grid(True, color=INK, alpha=0.18, linewidth=0.6)
    ax.tick_params(colors=INK, labelsize=9)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def svg(draw: Callable[[Axes], None], wide: bool = False) -> str:
    """A chart as inline SVG with a transparent background."""
    figure = Figure(figsize=(11, 2.3) if wide else (6, 3.2), layout="constrained", facecolor="none")
    ax = figure.subplots()
    ax.set_facecolor("none")
    draw(ax)
    return drawn(figure)


def drawn(figure: Figure) -> str:
    """A figure as inline SVG; the same figure gives the same text."""
    with matplotlib.rc_context({"svg.hashsalt": "leanseek"}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return inline(out.getvalue())


def inline(picture: str) -> str:
    """An SVG file as part of a page."""
    return re.sub(r"^.*?(?=<svg)", "", picture, flags=re.S)


def card(title: str, body: str, wide: bool = False) -> str:
    return f'<section class="{"wide" if wide else ""}"><h2>{html.escape(title)}</h2>{body}</section>'


def figure(value: str, label: str) -> str:
    return f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"


def page(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML."""
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
{body}</body></html>
"""
