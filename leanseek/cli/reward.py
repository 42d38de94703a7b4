"""leanseek reward: train a reward model on pairs of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from leanseek.cli.terminal import given_text, spelled
from leanseek.reading import shorten


def reward(
    config: Annotated[str, typer.Argument(metavar="CONFIG.toml", help="a TOML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    name: Annotated[str | None, typer.Option(help="folder in runs/; the file's name when unset")] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="PATH", help="the run, checkpoint or Hugging Face folder to give a score"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest good checkpoint")] = False,
    compare: Annotated[Path | None, typer.Option(help="another run to plot with this one in the report")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="processes on this machine (torchrun for several machines)")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> None:
    """Train a reward model on the pairs in data.path; writes runs/NAME/ as `leanseek train` does."""
    from leanseek.posttraining.reward_run import RewardRun
    from leanseek.posttraining.reward_run import train_reward as run

    named = [] if name is None else [f"name={json.dumps(given_text(name, '--name'))}"]
    begun = [] if source is None else [f"from={json.dumps(given_text(source, '--from'))}"]
    given = [given_text(override, shorten(override)) for override in overrides or []]
    settings = RewardRun.load(config, [*given, *begun, *named], Path("runs") if resume else None)
    from leanseek.distributed import check_layout, join, launch, launched

    if nproc > 1 and not launched():
        check_layout(settings, nproc)
        raise typer.Exit(launch(nproc))
    with join(settings) as part:
        done = run(settings, resume=resume, compare=compare, part=part)
    if not part.writes:
        return
    if as_json:
        print(json.dumps(done._asdict() | {"folder": str(done.folder)}))
        return
    print(f"{spelled(str(done.folder))}: {done.step} steps, {done.tokens:,} tokens in {done.seconds:,.0f} s")
    if done.val_loss is not None:
        print(f"validation loss {done.val_loss:.4f}")
    print(f"report: {spelled(str(done.folder / 'report.html'))}")
