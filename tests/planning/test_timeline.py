"""Timelines are drawn: every action a box, every micro-batch a number, one picture for plans and recordings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leanseek.config import ConfigError
from leanseek.planning.schedules import bubble, build, simulate
from leanseek.planning.timeline import INK, KINDS, draw, draw_schedule


def test_every_action_is_a_box_with_its_number(tmp_path: Path) -> None:
    schedule = build("dualpipev", 2, 5)
    picture = draw_schedule("dualpipev", 2, 5, tmp_path / "plan.svg").read_text(encoding="utf-8")
    actions = [action for steps in schedule.steps for step in steps for action in step]
    for kind, (color, label) in KINDS.items():
        boxes = sum(action.kind == kind for action in actions)
        assert len(re.findall(f"fill: {color}", picture)) == boxes + 1, label  # and the legend's
    numbers = [line for line in picture.splitlines() if re.search(r">\d</text>", line) and INK not in line]
    assert len(numbers) == len(actions)
    assert f"{bubble(simulate(schedule)):.1%} of the time idle" in picture


def test_charts_stand_below_each_other_and_files_repeat(tmp_path: Path) -> None:
    charts = {"plan": simulate(build("1f1b", 2, 3)), "run": simulate(build("zb1p", 3, 4))}
    one, two = (draw(charts, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert one == two
    assert b"plan: 25.0% of the time idle" in one and b"run: " in one and one.count(b"rank 2") == 1
    assert draw(charts, tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["timeline.pdf", "timeline"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.svg or \.png"):
        draw_schedule("1f1b", 2, 3, tmp_path / name)
