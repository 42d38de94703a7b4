"""leanseek eval: score a model on tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from leanseek.cli.generate import AllowLinks
from leanseek.cli.terminal import spelled
from leanseek.errors import InputError


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face folder or a run")],
    tasks: Annotated[
        str,
        typer.Option(help="comma-separated: human_eval, luce_gsm8k, luce_hellaswag, luce_truthfulqa, or lm-eval's"),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="the most samples per task")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="examples in the prompt, for lm-eval's tasks")] = None,
    include_path: Annotated[Path | None, typer.Option(help="a folder with lm-eval task files of your own")] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="let human_eval run what the model writes, and --include-path what its task files name",
        ),
    ] = False,
    allow_links: AllowLinks = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Evaluate a model on tasks, through the engine in this process."""
    from leanseek.engine import LLM
    from leanseek.evaluation import local
    from leanseek.evaluation.scoring import Scorer

    names = [name for name in tasks.split(",") if name]
    if not names:
        raise InputError("--tasks names no task")
    if include_path is not None and not allow_code_execution:
        raise InputError(
            "the task files of --include-path may name Python that lm-eval runs on this machine (!function, templates, "
            "metrics); allow it with --allow-code-execution"
        )
    others = [name for name in names if name not in local.TASKS]
    harness = _harness() if others else None
    if "human_eval" in names and not allow_code_execution:
        raise InputError("human_eval runs what the model writes on this machine; allow it with --allow-code-execution")
    scorer = Scorer(LLM(model, allow_links=allow_links))
    results: dict[str, Any] = {name: local.TASKS[name](scorer, limit) for name in names if name in local.TASKS}
    if harness:
        results |= harness.evaluate(scorer, others, limit, num_fewshot, include_path)
    if as_json:
        print(json.dumps({"model": model, "results": results}))
        return
    for name, figures in results.items():
        print(
            f"{spelled(name)}: "
            + ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if value is not None)
        )


def _harness() -> Any:
    try:
        from leanseek.evaluation import harness
    except ImportError as error:
        raise InputError(f"lm-eval's tasks need the package lm-eval ({error}): pip install 'leanseek[eval]'") from None
    return harness
