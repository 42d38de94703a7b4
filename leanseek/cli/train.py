"""leanseek train: run a TOML file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from leanseek.cli import runs
from leanseek.errors import InputError

if TYPE_CHECKING:
    from leanseek.training import Summary
    from leanseek.training.part import Part


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.toml", help="a TOML file, or the name of a preset")],
    overrides: runs.Overrides = None,
    name: runs.Name = None,
    source: Annotated[
        str | None, runs.source("begin with the weights of this run, checkpoint or Hugging Face folder")
    ] = None,
    resume: runs.Resume = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="reduce the steps if this machine would take longer")
    ] = None,
    compare: runs.Compare = None,
    nproc: runs.Processes = 1,
    as_json: runs.AsJson = False,
) -> None:
    """Train; writes runs/NAME/ with config.toml, metrics.jsonl, checkpoints/, tensorboard/ and report.html."""
    from leanseek.training import RunConfig, fit_steps
    from leanseek.training import train as run

    if resume and minutes is not None:
        raise InputError("--minutes sets the length of a run when it starts; leave it out with --resume")
    settings = runs.read(RunConfig, config, overrides, name, source, resume)

    def work(part: Part) -> Summary:
        fitted = settings
        if minutes is not None:
            fitted, line = fit_steps(settings, minutes, part)
            if part.writes:
                print(line, file=sys.stderr)
        return run(fitted, resume=resume, compare=compare, part=part)

    runs.start(settings, nproc, work, as_json)
