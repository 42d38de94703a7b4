"""leanseek grpo: train a policy on rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanseek.cli.terminal import given_text, spelled
from leanseek.reading import shorten

if TYPE_CHECKING:
    from leanseek.engine import Tokenizer
    from leanseek.posttraining.grpo import Chat


def grpo(
    config: Annotated[str, typer.Argument(metavar="CONFIG.toml", help="a TOML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    name: Annotated[str | None, typer.Option(help="folder in runs/; the file's name when unset")] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="PATH", help="the policy to begin with: a run or a model folder")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest good checkpoint")] = False,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a Jinja chat template instead of the model's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> None:
    """Train on rewards (GRPO); writes runs/NAME/ as train does, and completions.jsonl."""
    from leanseek.posttraining.grpo import Chat
    from leanseek.posttraining.grpo import grpo as run
    from leanseek.posttraining.grpo_config import GRPORun
    from leanseek.server.templates import template_of

    named = [] if name is None else [f"name={json.dumps(given_text(name, '--name'))}"]
    begun = [] if source is None else [f"from={json.dumps(given_text(source, '--from'))}"]
    given = [given_text(override, shorten(override)) for override in overrides or []]
    settings = GRPORun.load(config, [*given, *begun, *named], Path("runs") if resume else None)

    def chat(tokenizer: Tokenizer) -> Chat:
        template = template_of(tokenizer, settings.model, chat_template)
        return Chat(template.render, template.stop)

    done = run(settings, chat, resume=resume)
    last = _last(done.folder)
    if as_json:
        print(json.dumps(done._asdict() | {"folder": str(done.folder)} | last))
        return
    print(f"{spelled(str(done.folder))}: {done.step} steps, {done.tokens:,} tokens in {done.seconds:,.0f} s")
    print(", ".join(f"{spelled(key)} {value:.3f}" for key, value in last.items()))
    print(f"report: {spelled(str(done.folder / 'report.html'))}")


def _last(folder: Path) -> dict[str, float]:
    """The newest reward and pass_at."""
    from leanseek.training.metrics import read_rows

    seen = {key: value for row in read_rows(folder / "metrics.jsonl") for key, value in row.items()}
    return {k: v for k, v in seen.items() if (k == "reward" or k.startswith("pass_at_")) and v is not None}
