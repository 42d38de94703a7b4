"""What the commands that train have in common: their options, how a run is read and started, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from leanseek.cli.terminal import given_text, spelled
from leanseek.reading import shorten

if TYPE_CHECKING:
    from leanseek.training import RunConfig, Summary
    from leanseek.training.part import Part

    R = TypeVar("R", bound=RunConfig)

Config = Annotated[str, typer.Argument(metavar="CONFIG.toml", help="a TOML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")]
Name = Annotated[str | None, typer.Option(help="folder in runs/; the file's name when unset")]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest good checkpoint")]
Compare = Annotated[Path | None, typer.Option(help="another run to plot with this one in the report")]
Processes = Annotated[int, typer.Option(min=1, help="processes on this machine (torchrun for several machines)")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object at the end")]


def source(help: str) -> Any:
    """The option --from."""
    return typer.Option("--from", metavar="PATH", help=help)


def read(
    kind: type[R], config: str, overrides: list[str] | None, name: str | None, source: str | None, resume: bool
) -> R:
    """The run that a file and the options describe. Raises ConfigError."""
    named = [] if name is None else [f"name={json.dumps(given_text(name, '--name'))}"]
    begun = [] if source is None else [f"from={json.dumps(given_text(source, '--from'))}"]
    given = [given_text(override, shorten(override)) for override in overrides or []]
    return kind.load(config, [*given, *begun, *named], Path("runs") if resume else None)


def start(settings: RunConfig, nproc: int, work: Callable[[Part], Summary], as_json: bool) -> None:
    """Do a run's work in this process or as `nproc` ranks; the first rank prints what came of it."""
    from leanseek.distributed import check_layout, join, launch, launched

    if nproc > 1 and not launched():
        check_layout(settings, nproc)
        raise typer.Exit(launch(nproc))
    with join(settings) as part:
        done = work(part)
    if not part.writes:
        return
    bits = "" if done.val_bits_per_byte is None else f", {done.val_bits_per_byte:.4f} bits per byte"
    say(done, {}, "" if done.val_loss is None else f"validation loss {done.val_loss:.4f}{bits}", as_json)


def say(done: Summary, more: dict[str, float], words: str, as_json: bool) -> None:
    """Print what came of a run: `more` figures go into its JSON object, `words` are its second line."""
    if as_json:
        print(json.dumps(done._asdict() | {"folder": str(done.folder)} | more))
        return
    print(f"{spelled(str(done.folder))}: {done.step} steps, {done.tokens:,} tokens in {done.seconds:,.0f} s")
    if words:
        print(words)
    print(f"report: {spelled(str(done.folder / 'report.html'))}")
