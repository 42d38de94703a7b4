"""leanseek train: run a TOML file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from leanseek.cli.terminal import given_text, spelled
from leanseek.errors import InputError
from leanseek.reading import shorten


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.toml", help="a TOML file, or the name of a preset")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    name: Annotated[str | None, typer.Option(help="folder in runs/; the file's name when unset")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="PATH", help="begin with the weights of this run, checkpoint or Hugging Face folder"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest good checkpoint")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="reduce the steps if this machine would take longer")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="another run to plot with this one in the report")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="processes on this machine (torchrun for several machines)")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> None:
    """Train; writes runs/NAME/ with config.toml, metrics.jsonl, checkpoints/, tensorboard/ and report.html."""
    from leanseek.training import RunConfig, fit_steps
    from leanseek.training import train as run

    if resume and minutes is not None:
        raise InputError("--minutes sets the length of a run when it starts; leave it out with --resume")
    named = [] if name is None else [f"name={json.dumps(given_text(name, '--name'))}"]
    begun = [] if source is None else [f"from={json.dumps(given_text(source, '--from'))}"]
    given = [given_text(override, shorten(override)) for override in overrides or []]
    settings = RunConfig.load(config, [*given, *begun, *named], Path("runs") if resume else None)
    from leanseek.distributed import check_layout, join, launch, launched

    if nproc > 1 and not launched():
        check_layout(settings, nproc)
        raise typer.Exit(launch(nproc))
    with join(settings) as part:
        if minutes is not None:
            settings, line = fit_steps(settings, minutes, part)
            if part.writes:
                print(line, file=sys.stderr)
        done = run(settings, resume=resume, compare=compare, part=part)
    if not part.writes:
        return
    if as_json:
        print(json.dumps(done._asdict() | {"folder": str(done.folder)}))
        return
    print(f"{spelled(str(done.folder))}: {done.step} steps, {done.tokens:,} tokens in {done.seconds:,.0f} s")
    if done.val_loss is not None:
        print(f"validation loss {done.val_loss:.4f}, {done.val_bits_per_byte:.4f} bits per byte")
    print(f"report: {spelled(str(done.folder / 'report.html'))}")
