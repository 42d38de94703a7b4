"""What the report of a run draws of its rows."""

from __future__ import annotations

from leanseek.plotting import Figure
from leanseek.training.report import _rank_chart


def _row(ranks: int) -> dict[str, object]:
    return {
        "ranks": {kind: [0.1 * (rank + 1) for rank in range(ranks)] for kind in ("compute_s", "exchange_s", "wait_s")}
    }


def test_a_run_resumed_on_fewer_ranks_shows_the_ranks_that_it_has_now() -> None:
    ((title, draw),) = _rank_chart([_row(3), _row(3), {"loss": 1.0}, _row(2)])
    assert title.startswith("Time of each rank: rank 0")
    ax = Figure().subplots()
    draw(ax)
    assert [len(bars) for bars in ax.containers] == [2, 2, 2]


def test_a_run_of_one_process_has_no_such_chart() -> None:
    assert _rank_chart([{"loss": 1.0}]) == []
