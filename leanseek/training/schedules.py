"""Schedules: settings that change over a run, as pure functions of the step (section 4.2)."""

from __future__ import annotations

import math

from leanseek.training.config import RunConfig


def learning_rate(run: RunConfig, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, constant, cosine, constant, a last constant."""
    s, peak, done = run.schedule, run.optimizer.lr, step / run.train.steps
    if step < s.warmup_steps:
        return peak * (step + 1) / s.warmup_steps
    if done < s.decay_start:
        return peak
    if done < s.decay_end:
        progress = (done - s.decay_start) / (s.decay_end - s.decay_start)
        return s.final_lr + (peak - s.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return s.final_lr if done < s.last_start else s.last_lr


def batch_size(run: RunConfig, step: int) -> int:
    """Sequences in step `step`: grows linearly from batch_size_start over the first `ramp` share of the steps."""
    t = run.train
    length = t.ramp * t.steps
    if not t.batch_size_start or step >= length:
        return t.batch_size
    return round(t.batch_size_start + (t.batch_size - t.batch_size_start) * step / length)


def bias_update_speed(run: RunConfig, step: int) -> float:
    """γ of step `step`: constant, or decaying linearly (for short runs, which need a larger γ); 0 after bias_freeze."""
    b, done = run.balance, step / run.train.steps
    if done >= b.bias_freeze:
        return 0.0
    return b.bias_update_speed * (1 - (1 - b.bias_update_decay) * done / b.bias_freeze)


def mtp_weight(run: RunConfig, step: int) -> float:
    """λ of step `step` (eq. 25)."""
    return run.mtp.weight if step / run.train.steps < run.mtp.late_start else run.mtp.weight_late
