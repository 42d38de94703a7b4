"""leanseek reward: train a reward model on pairs of answers."""

from __future__ import annotations

from typing import Annotated

from leanseek.cli import runs


def reward(
    config: runs.Config,
    overrides: runs.Overrides = None,
    name: runs.Name = None,
    source: Annotated[str | None, runs.source("the run, checkpoint or Hugging Face folder to give a score")] = None,
    resume: runs.Resume = False,
    compare: runs.Compare = None,
    nproc: runs.Processes = 1,
    as_json: runs.AsJson = False,
) -> None:
    """Train a reward model on the pairs in data.path; writes runs/NAME/ as `leanseek train` does."""
    from leanseek.posttraining.reward_run import RewardRun, train_reward

    settings = runs.read(RewardRun, config, overrides, name, source, resume)
    runs.start(settings, nproc, lambda part: train_reward(settings, resume=resume, compare=compare, part=part), as_json)
