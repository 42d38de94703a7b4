"""leanseek eval: score a model on tasks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from leanseek.cli.generate import AllowLinks
from leanseek.cli.terminal import spelled
from leanseek.errors import InputError
from leanseek.reading import read_text, shorten


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face folder or a run")],
    tasks: Annotated[
        str,
        typer.Option(
            help="comma-separated: needle, needle_multikey, copy, human_eval, luce_gsm8k, luce_hellaswag, "
            "luce_truthfulqa, or lm-eval's"
        ),
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="the most samples per task; of needle and copy, in each cell")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="examples in the prompt, for lm-eval's tasks")] = None,
    include_path: Annotated[Path | None, typer.Option(help="a folder with lm-eval task files of your own")] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="let human_eval run what the model writes, and --include-path what its task files name",
        ),
    ] = False,
    lengths: Annotated[
        str | None, typer.Option(help="of needle and copy, in tokens, such as 512,4096; doubled from 512 when unset")
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(help="a text in which needles are hidden; plain sentences if unset")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="draw the maps of needle and copy into this PNG or SVG")] = None,
    allow_links: AllowLinks = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Evaluate a model on tasks, through the engine in this process."""
    from leanseek.engine import LLM
    from leanseek.evaluation import local, needle
    from leanseek.evaluation.scoring import Scorer

    names = [name for name in tasks.split(",") if name]
    if not names:
        raise InputError("--tasks names no task")
    if include_path is not None and not allow_code_execution:
        raise InputError(
            "the task files of --include-path may name Python that lm-eval runs on this machine (!function, templates, "
            "metrics); allow it with --allow-code-execution"
        )
    others = [name for name in names if name not in (*local.TASKS, *needle.TASKS)]
    mapped = [name for name in names if name in needle.TASKS]
    settings = {"--lengths": lengths, "--haystack": haystack, "--picture": picture}
    if unused := [key for key, value in settings.items() if value is not None and not mapped]:
        raise InputError(f"{unused[0]} is for {', '.join(needle.TASKS)}, none of which --tasks names")
    if picture is not None:
        needle.check_picture(picture)
    wanted, text = _lengths(lengths), None if haystack is None else read_text(haystack)
    harness = _harness() if others else None
    if "human_eval" in names and not allow_code_execution:
        raise InputError("human_eval runs what the model writes on this machine; allow it with --allow-code-execution")
    scorer = Scorer(LLM(model, allow_links=allow_links))
    results: dict[str, Any] = {name: local.TASKS[name](scorer, limit) for name in names if name in local.TASKS}
    count = limit or needle.NEEDLES
    maps = {name: needle.find(scorer, name, wanted, count, text) for name in mapped}
    results |= {name: needle.figures(cells, count) for name, cells in maps.items()}
    if picture is not None:
        needle.save_picture(picture, maps)
    if harness:
        results |= harness.evaluate(scorer, others, limit, num_fewshot, include_path)
    if as_json:
        print(json.dumps({"model": model, "results": results}))
        return
    for name, figures in results.items():
        print(
            f"{spelled(name)}: "
            + ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, int | float))
        )
        if name in maps:
            _print_map(maps[name])


def _print_map(cells: list[Any]) -> None:
    """A line a length: the share that was found at each depth, from the beginning to the end."""
    for length, row in itertools.groupby(cells, key=lambda cell: cell.length):
        print(f"{length:>9,}  " + " ".join(f"{cell.accuracy:>4.0%}" for cell in row))


def _lengths(text: str | None) -> list[int]:
    found = [part.strip() for part in (text or "").split(",") if part.strip()]
    if wrong := [part for part in found if not (part.isascii() and part.isdigit() and 0 < int(part) < 2**31)]:
        raise InputError(f"--lengths {shorten(wrong[0])} is not a number of tokens")
    return [int(part) for part in found]


def _harness() -> Any:
    try:
        from leanseek.evaluation import harness
    except ImportError as error:
        raise InputError(f"lm-eval's tasks need the package lm-eval ({error}): pip install 'leanseek[eval]'") from None
    return harness
