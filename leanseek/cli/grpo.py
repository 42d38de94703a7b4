"""leanseek grpo: train a policy on rewards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanseek.cli import runs
from leanseek.cli.terminal import spelled

if TYPE_CHECKING:
    from leanseek.engine import Tokenizer
    from leanseek.posttraining.grpo import Chat


def grpo(
    config: runs.Config,
    overrides: runs.Overrides = None,
    name: runs.Name = None,
    source: Annotated[str | None, runs.source("the policy to begin with: a run or a model folder")] = None,
    resume: runs.Resume = False,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a Jinja chat template instead of the model's")
    ] = None,
    as_json: runs.AsJson = False,
) -> None:
    """Train on rewards (GRPO); writes runs/NAME/ as train does, and completions.jsonl."""
    from leanseek.posttraining.grpo import Chat
    from leanseek.posttraining.grpo import grpo as run
    from leanseek.posttraining.grpo_config import GRPORun
    from leanseek.server.templates import template_of

    settings = runs.read(GRPORun, config, overrides, name, source, resume)

    def chat(tokenizer: Tokenizer) -> Chat:
        template = template_of(tokenizer, settings.model, chat_template)
        return Chat(template.render, template.stop)

    done = run(settings, chat, resume=resume)
    last = _last(done.folder)
    runs.say(done, last, ", ".join(f"{spelled(key)} {value:.3f}" for key, value in last.items()), as_json)


def _last(folder: Path) -> dict[str, float]:
    """The newest reward and pass_at."""
    from leanseek.training.metrics import read_rows

    seen = {key: value for row in read_rows(folder / "metrics.jsonl") for key, value in row.items()}
    return {k: v for k, v in seen.items() if (k == "reward" or k.startswith("pass_at_")) and v is not None}
