"""leanseek eval says in one line what is missing, before it loads a model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import leanseek.evaluation
from leanseek.cli import app
from leanseek.errors import InputError
from leanseek.evaluation import local


def run(*arguments: str) -> None:
    app(["eval", "nowhere", *arguments], standalone_mode=False)


def test_code_is_run_only_when_allowed() -> None:
    with pytest.raises(InputError, match="--allow-code-execution"):
        run("--tasks", "human_eval")


@pytest.mark.parametrize("tasks", ["own", "luce_gsm8k", "own,human_eval"])
def test_task_files_of_somebodys_are_read_only_when_allowed(tmp_path: Path, tasks: str) -> None:
    (tmp_path / "own.yaml").write_text("task: own\ndoc_to_text: !function utils.text\n")
    (tmp_path / "utils.py").write_text("open('ran', 'w')\n")
    with pytest.raises(InputError, match=r"--include-path.*--allow-code-execution"):
        run("--tasks", tasks, "--include-path", str(tmp_path))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "leanseek.evaluation.harness", raising=False)
    monkeypatch.delattr(leanseek.evaluation, "harness", raising=False)
    with pytest.raises(InputError, match=r"pip install 'leanseek\[eval\]'"):
        run("--tasks", "arc_easy")
    with pytest.raises(InputError, match="pip install no-such"):
        local._cases("no_such_package", "no-such", "x.jsonl", None)


def test_no_task_is_no_evaluation() -> None:
    with pytest.raises(InputError, match="names no task"):
        run("--tasks", ",")
