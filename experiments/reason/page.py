"""The report of `make reason`: one page that tells what happened, from the rows of results.json."""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leanseek.pages import COLORS, INK, card, figure, page, quiet, svg
from leanseek.plotting import Axes, Figure
from leanseek.writing import replace_file

NAMES = {
    "sft": "after SFT", "grpo": "GRPO", "random": "GRPO, random reward", "rejection": "rejection sampling, SFT",
    "model": "GRPO, reward model alone", "mixture": "GRPO, model and rule", "short": "student, SFT on short answers",
    "student-grpo": "student, SFT and GRPO", "distilled": "student, distilled",
}  # fmt: skip
MODELLED = ("model", "mixture")  # by a reward model
POLICIES = ("grpo", "random", *MODELLED, "student-grpo")
Point = Sequence[float]


def write_page(rows: Sequence[Any], out: Path) -> None:
    """rows: as `leanseek.reproduce.results.read` gives them, of one recipe."""
    by_arm = _by_arm(rows)
    replace_file(out, page("Learning to reason · leanseek", _body(by_arm)).encode())


def _by_arm(rows: Sequence[Any]) -> dict[str, list[Any]]:
    return {arm: own for arm in NAMES if (own := [row for row in rows if row.arm == arm])}


def _some(by_arm: dict[str, list[Any]], arms: Sequence[str]) -> dict[str, list[Any]]:
    return {arm: rows for arm, rows in by_arm.items() if arm in arms}


def draw(rows: Sequence[Any], out: Path) -> None:
    """A picture of the same: accuracy by step, what all arms end with, and both rewards where a model gives one."""
    by_arm = _by_arm(rows)
    modelled = _some(by_arm, MODELLED)
    figure = Figure(figsize=(17 if modelled else 12, 4), layout="constrained", facecolor="white")
    left, right, *more = figure.subplots(1, 3 if modelled else 2)
    _curves(left, _some(by_arm, POLICIES), lambda row: row.curve)
    left.set_ylabel("right of held-out problems, greedy", color=INK)
    left.set_xlabel("step of GRPO", color=INK)
    _bars(right, by_arm)
    for ax in more:
        _both(ax, modelled)
    figure.savefig(out, dpi=130)


def _both(ax: Axes, by_arm: dict[str, list[Any]]) -> None:
    """By step: what the reward model gives, dotted, by the axis on the right; and what is right."""
    given = ax.twinx()
    for arm, rows in by_arm.items():
        color = COLORS[POLICIES.index(arm) % len(COLORS)]
        for row in rows:
            points = _smooth(_of("reward/model")(row))
            given.plot(*zip(*points, strict=True), color=color, linewidth=1.4, linestyle=":")
    _curves(ax, by_arm, _of("reward/answer"))
    ax.set_ylabel("right of sampled answers", color=INK)
    given.set_ylabel("reward model's score (dotted)", color=INK)
    quiet(given)


def _body(by_arm: dict[str, list[Any]]) -> str:
    policies = _some(by_arm, POLICIES)
    charts = [
        ("Reward of the rule, by step of GRPO", lambda ax: _curves(ax, policies, _of("reward/answer", "reward"))),
        ("Greedy accuracy on held-out problems of the curve", lambda ax: _curves(ax, policies, lambda row: row.curve)),
        ("Share of sampled answers that think", lambda ax: _curves(ax, policies, _of("long"))),
        ("Tokens of an answer", lambda ax: _curves(ax, policies, _of("completion_length"), share=False)),
        ("Entropy of a token, nats", lambda ax: _curves(ax, policies, _of("entropy"), share=False)),
    ]
    if "model" in by_arm:
        modelled = _some(by_arm, MODELLED)
        charts.append(("Reward of the model, by step", lambda ax: _curves(ax, modelled, _of("reward/model"), False)))
    drawn = "".join(card(title, svg(draw)) for title, draw in charts) if policies else ""
    return (
        _HEAD
        + _figures(by_arm)
        + f'<div class="charts">{card("All arms", svg(lambda ax: _bars(ax, by_arm), True), True)}'
        f"{drawn}</div>{_table(by_arm)}{_answers(by_arm)}"
    )


_HEAD = """<h1>Learning to reason</h1>
<p>A small V3, pre-trained on traces of arithmetic, is fine-tuned on chats about the sum of three numbers of three
digits. A quarter of their answers think first, column by column. GRPO rewards right answers alone, whichever way they
are found. Reinforcement amplifies what is there: pass@8 after SFT says how much that is.</p>
<p>The student has half the width and was pre-trained on the same without the thoughts. What it has not read cannot be
amplified in it; its teacher's right answers show it how.</p>
"""


def _mean(rows: Sequence[Any], key: str) -> float:
    return statistics.fmean(row.measured[key] for row in rows)


def _figures(by_arm: dict[str, list[Any]]) -> str:
    found = ""
    for arm, rows in by_arm.items():
        if arm in ("sft", "grpo", "short", "distilled"):
            found += figure(f"{_mean(rows, 'greedy'):.1%}", f"{NAMES[arm]}: held-out problems right, greedy")
    if "sft" in by_arm:
        found += figure(f"{_mean(by_arm['sft'], 'pass_at_k'):.1%}", f"after SFT: pass@{by_arm['sft'][0].measured['k']}")
    return f'<div class="figures">{found}</div>'


def _of(*keys: str) -> Callable[[Any], Sequence[Point]]:
    """The first of these curves that a row has."""

    def curve(row: Any) -> Sequence[Point]:
        found = row.measured["curves"]
        return next((found[key] for key in keys if found.get(key)), [])

    return curve


def _curves(
    ax: Axes, by_arm: dict[str, list[Any]], curve: Callable[[Any], Sequence[Point]], share: bool = True
) -> None:
    """A thin line a seed, in the arm's color."""
    for arm, rows in by_arm.items():
        color = COLORS[POLICIES.index(arm) % len(COLORS)]
        for number, row in enumerate(rows):
            points = _smooth(curve(row))
            ax.plot(
                *zip(*points, strict=True), color=color, linewidth=1.4, label=NAMES[arm] if not number else None
            ) if (points) else None
    if share:
        ax.set_ylim(0, 1.02)
    quiet(ax)
    ax.set_xlabel("step", color=INK)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, labelcolor=INK, fontsize=9)


def _smooth(points: Sequence[Point], width: int = 5) -> list[Point]:
    """Means over a few steps; a curve of few points stays as it is."""
    if len(points) < 8 * width:
        return list(points)
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [[part[-1][0], statistics.fmean(p[1] for p in part)] for part in parts]


def _bars(ax: Axes, by_arm: dict[str, list[Any]]) -> None:
    for place, rows in enumerate(by_arm.values()):
        greedy, passed = _mean(rows, "greedy"), _mean(rows, "pass_at_k")
        ax.barh(place, passed, color=INK, alpha=0.25, height=0.6)
        ax.barh(place, greedy, color=COLORS[0], height=0.6)
        ax.text(max(greedy, passed) + 0.01, place, f"{greedy:.1%}", va="center", color=INK, fontsize=9)
    ax.set_yticks(range(len(by_arm)), [NAMES[arm] for arm in by_arm])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.12)
    quiet(ax)
    ax.set_xlabel("right on held-out problems: greedy, and behind it pass@8", color=INK)


def _table(by_arm: dict[str, list[Any]]) -> str:
    head = ("", "seeds", "greedy", "each seed", "sampled", "pass@8", "think", "tokens", "minutes")
    lines = []
    for arm, rows in by_arm.items():
        each = " ".join(f"{row.measured['greedy']:.1%}" for row in rows)
        cells = [
            NAMES[arm], str(len(rows)), f"{_mean(rows, 'greedy'):.1%}", each, f"{_mean(rows, 'sampled'):.1%}",
            f"{_mean(rows, 'pass_at_k'):.1%}", f"{_mean(rows, 'long'):.0%}", f"{_mean(rows, 'length'):.1f}",
            f"{statistics.fmean(row.seconds for row in rows) / 60:.1f}",
        ]  # fmt: skip
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    return card("Held-out problems", body, wide=True)


def _answers(by_arm: dict[str, list[Any]]) -> str:
    """The same problems, before and after."""
    shown = [arm for arm in ("sft", "grpo", "short", "distilled") if arm in by_arm]
    head = "".join(f"<th>{html.escape(NAMES[arm])}</th>" for arm in shown)
    lines = ""
    for number, first in enumerate(by_arm[shown[0]][0].measured["answers"]) if shown else ():
        cells = ""
        for arm in shown:
            one = by_arm[arm][0].measured["answers"][number]
            mark = "✓" if one["right"] else "✗"
            cells += f"<td><pre>{html.escape(one['answer'])} {mark}</pre></td>"
        lines += f"<tr><td>{html.escape(first['prompt'])}</td>{cells}</tr>"
    return card("Answers before and after", f"<table><tr><th></th>{head}</tr>{lines}</table>", wide=True)
