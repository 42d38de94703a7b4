"""The run: loss, optimizer, schedules, balancing step, metrics, report."""

from leanseek.training.config import RunConfig
from leanseek.training.loop import Summary, train
from leanseek.training.pace import fit_steps
from leanseek.training.trainer import StepResult, Trainer

__all__ = ["RunConfig", "StepResult", "Summary", "Trainer", "fit_steps", "train"]
