"""leanseek reproduce: the paper's claims, run and judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

RUNS = Path("runs/reproduce")


def reproduce(
    claims: Annotated[list[str] | None, typer.Argument(metavar="[CLAIM]...", help="all when none is named")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a tenth of the steps, for a first look")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="run nothing; write what was found to an .html or .md file")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=3, help="how many seeds to run")] = 3,
    jobs: Annotated[int | None, typer.Option(min=1, help="runs side by side; one a core when unset")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> None:
    """Run what is missing of the paper's claims, judge them, and draw their pictures (docs/claims.md)."""
    from leanseek.reproduce import find_claims, runner
    from leanseek.reproduce.report import judge, write_folder, write_report

    chosen = find_claims(claims or [], quick)
    if report is None:
        runner.reproduce(chosen, RUNS / "quick" if quick else RUNS, seeds, jobs)
    found = [judge(claim, RUNS / "quick" if quick else RUNS) for claim in chosen]
    if report is not None:
        write_report(found, report)
        print(report)
        return
    for one in found:
        write_folder(one)
    if as_json:
        print(json.dumps({one.claim.name: one.verdict._asdict() | {"hours": one.found.hours} for one in found}))
        return
    for one in found:
        print(f"{one.claim.name}: {one.verdict.word}. {one.verdict.ours}")
    print("the report: leanseek reproduce --report claims.html", file=sys.stderr)
