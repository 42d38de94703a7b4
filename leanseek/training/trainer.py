"""One optimizer step, and everything it changes: weights, moments, balancing biases, EMA."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from leanseek import fp8
from leanseek.checkpoint import CheckpointError
from leanseek.checkpoint.pieces import Spread
from leanseek.config import ConfigError
from leanseek.machine.device import default_device, preferred_dtype
from leanseek.model import Transformer, max_violation
from leanseek.training.balance import add_counts, update_biases
from leanseek.training.config import RunConfig
from leanseek.training.diagnose import Finding, find_nonfinite, largest_gradient
from leanseek.training.guard import SpikeGuard
from leanseek.training.objective import Losses, losses
from leanseek.training.optimizer import EMA, build_optimizer
from leanseek.training.reduction import Reduction
from leanseek.training.schedules import bias_update_speed, learning_rate, mtp_weight


class StepResult(NamedTuple):
    """What happened in a step. `applied` is False when a loss or gradient was not finite, or the loss jumped: nothing
    has changed then."""

    loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float  # before clipping
    lr: float
    applied: bool
    culprit: str  # "", or what was not finite first, or the largest gradient of a spike (diagnose.py)
    reason: str  # why the step was not applied, in words
    counts: dict[int, Tensor]  # tokens per expert [E] int64 of each MoE layer, over the whole batch, on the CPU
    max_violation: dict[int, float]  # of each MoE layer


class Trainer:
    """Owns the model while it trains. Data, files and time are the loop's business.

    `reduction` makes the step's figures of this rank's (reduction.py); by default this process is the only one.

    Raises:
        ConfigError: `train.device` is not there.
    """

    def __init__(self, run: RunConfig, model: Transformer | None = None, reduction: Reduction | None = None):
        self.run, self.reduction = run, reduction or Reduction()
        self.device = default_device() if run.train.device == "auto" else _device(run.train.device)
        self.dtype = preferred_dtype(self.device) if run.train.dtype == "auto" else getattr(torch, run.train.dtype)
        if model is None:
            model = Transformer(run.model).init_weights(run.train.seed)
        self.model = model.to(self.device)
        fp8.apply(self.model, run.train.precision)
        self.optimizer = build_optimizer(self.model, run.optimizer, run.moments)
        self.guard = SpikeGuard(run.train.spike_limit)
        self.ema = EMA(self.model, run.optimizer.ema) if run.optimizer.ema else None

    def step(self, tokens: Tensor, step: int, sequences: int | None = None) -> StepResult:
        """Train on tokens [B, T + lookahead]; `step` counts from 0 and sets the schedules. Waits for the device.

        sequences: of the whole step, where other ranks train on some of them.
        """
        run, sequences = self.run, sequences or tokens.shape[0]
        tokens = tokens.to(self.device)
        counts: dict[int, Tensor] = {}
        sums = torch.zeros(3, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        parts = tokens.split(run.train.micro_batch_size or tokens.shape[0])
        for part in parts:
            found = self.forward(part, step)
            share = part.shape[0] / sequences  # the mean over micro-batches and ranks, whatever their sizes
            found.backward(share)
            add_counts(counts, found.routes)
            sums += torch.stack((found.main, found.mtp, found.balance)).detach() * share
        loads = torch.stack(list(counts.values())) if counts else torch.zeros(0, 1, dtype=torch.int64)
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norm = self.reduction(gradients, sums, loads)
        loss, mtp_loss, balance_loss, grad_norm = torch.cat((sums, norm.detach().float().view(1))).tolist()
        lr = learning_rate(run, step)
        wrong, reason = Finding("", ""), ""
        if not math.isfinite(loss + mtp_loss + balance_loss + grad_norm):
            wrong = find_nonfinite(self.model, lambda: [self.forward(part, step) for part in parts])
            reason = f"{wrong.culprit} is not finite ({wrong.statistics})"
        elif spike := self.guard.spike(loss):
            wrong = largest_gradient(self.model)
            reason = f"{spike}; the largest gradient is the {wrong.culprit} ({wrong.statistics})"
        else:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), run.optimizer.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            update_biases(self.model, dict(zip(counts, loads, strict=True)), bias_update_speed(run, step))
            if self.ema:
                self.ema.update(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        loads = loads.cpu()
        violation = dict(zip(counts, max_violation(loads).tolist(), strict=True))
        by_layer = dict(zip(counts, loads, strict=True))
        return StepResult(
            loss, mtp_loss, balance_loss, grad_norm, lr, not reason, wrong.culprit, reason, by_layer, violation
        )

    def forward(self, tokens: Tensor, step: int = 0) -> Losses:
        """The losses that step `step` would differentiate, of tokens [B, T + lookahead] on the device."""
        return losses(
            self.model,
            tokens,
            mtp_weight=mtp_weight(self.run, step),
            sequence_alpha=self.run.balance.sequence_alpha,
            switch_alpha=self.run.balance.switch_alpha,
            dtype=self.dtype,
            recompute=self.run.train.recompute,
        )

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> tuple[float, float, int]:
        """Sums over tokens [B, T + lookahead]: negative log-likelihood, MTP's, and the number of targets."""
        found = losses(self.model, tokens.to(self.device), dtype=self.dtype)
        targets = tokens.shape[0] * (tokens.shape[1] - self.run.model.lookahead)
        return float(found.main) * targets, float(found.mtp) * targets, targets

    def nonfinite_weight(self) -> str | None:
        """The first weight that holds NaN or infinity, which no checkpoint may."""
        if bool(torch.nn.utils.get_total_norm(self.model.parameters()).isfinite()):
            return None
        return next((n for n, p in self.model.named_parameters() if not bool(p.isfinite().all())), None)

    # ---- state besides the model's own weights, by name ----

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments, step counts and EMA, named `exp_avg.NAME` and so on; references, not copies."""
        state = self.optimizer.state
        found = {
            f"{kind}.{name}": value
            for name, parameter in self.model.named_parameters()
            for kind, value in state[parameter].items()
        }
        if self.ema:
            found |= {f"ema.{name}": value for name, value in self.ema.weights.items()}
        return found

    def without_moments(self) -> list[str]:
        """Parameters that no step has moved: nothing differentiated them."""
        return [name for name, p in self.model.named_parameters() if not self.optimizer.state[p]]

    def load_state_tensors(self, stored: Mapping[str, Spread], without: Collection[str] | None = None) -> None:
        """The inverse of `state_tensors`. A moment stored in another dtype is converted.

        `without` names the parameters that have no moments; None where that was not stored. An average of the weights
        begins anew where none was kept, and goes where none is wanted.

        Raises:
            CheckpointError: a tensor is missing, or is none of this run's, or has another shape or dtype.
        """
        left = {name: found for name, found in stored.items() if self.ema or not name.startswith("ema.")}
        moments = torch.bfloat16 if self.run.moments == "bfloat16" else torch.float32
        averaged = any(name.startswith("ema.") for name in left)
        kept = {name for name in left if name.startswith(("step.", "exp_avg.", "exp_avg_sq."))}
        for name, parameter in self.model.named_parameters():
            own = {kind: f"{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq")}
            if kept.intersection(own.values()) or (without is not None and name not in without):
                step = _taken(left, own["step"], ()).read()
                if not (bool(step.isfinite()) and step >= 0):
                    raise CheckpointError(f"the checkpoint's {own['step']} is {step.item()}, not a number of steps")
                self.optimizer.state[parameter] = {"step": step.to(self.device)} | {
                    kind: _taken(left, own[kind], parameter.shape).read().to(self.device, moments)
                    for kind in ("exp_avg", "exp_avg_sq")
                }
            if self.ema and averaged:
                average = _taken(left, f"ema.{name}", parameter.shape)
                self.ema.weights[name] = average.read().to(self.device, torch.float32)
        if left:
            raise CheckpointError(f"the checkpoint's {min(left)} belongs to no parameter{_and_more(len(left))}")


def _taken(left: dict[str, Spread], name: str, shape: tuple[int, ...]) -> Spread:
    """Take a tensor out: the optimizer's kernels write by the weight's shape, whatever the moment's is."""
    found = left.pop(name, None)
    if found is None:
        raise CheckpointError(f"the checkpoint's {name} is missing")
    if found.shape != tuple(shape):
        raise CheckpointError(f"the checkpoint's {name} has shape {list(found.shape)}, not {list(shape)}")
    if found.dtype not in (torch.float32, torch.bfloat16):
        kind = str(found.dtype).removeprefix("torch.")
        raise CheckpointError(f"the checkpoint's {name} is {kind}, not float32 or bfloat16")
    return found


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"train.device = {name!r}: {str(error).splitlines()[0]}") from None
