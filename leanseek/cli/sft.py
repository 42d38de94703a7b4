"""leanseek sft: fine-tune on chats, or on preferences."""

from __future__ import annotations

from typing import Annotated

from leanseek.cli import runs


def sft(
    config: runs.Config,
    overrides: runs.Overrides = None,
    name: runs.Name = None,
    source: Annotated[str | None, runs.source("the run, checkpoint or Hugging Face folder to fine-tune")] = None,
    resume: runs.Resume = False,
    compare: runs.Compare = None,
    nproc: runs.Processes = 1,
    as_json: runs.AsJson = False,
) -> None:
    """Fine-tune on the chats or preferences in data.path; writes runs/NAME/ as `leanseek train` does."""
    from leanseek.posttraining.sft import sft as run
    from leanseek.posttraining.sft_config import SFTConfig

    settings = runs.read(SFTConfig, config, overrides, name, source, resume)
    runs.start(settings, nproc, lambda part: run(settings, resume=resume, compare=compare, part=part), as_json)
