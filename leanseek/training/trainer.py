"""One optimizer step, and everything it changes: weights, moments, balancing biases, EMA."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from leanseek import fp8
from leanseek.checkpoint import CheckpointError
from leanseek.checkpoint.pieces import Piece, Spread
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.machine.device import default_device, preferred_dtype
from leanseek.model import Transformer, max_violation
from leanseek.training.balance import update_biases
from leanseek.training.config import RunConfig
from leanseek.training.diagnose import find_nonfinite
from leanseek.training.guard import SpikeGuard
from leanseek.training.next_token import NextToken
from leanseek.training.objective import Losses, Objective
from leanseek.training.optimizer import EMA, build_optimizer
from leanseek.training.part import Part
from leanseek.training.schedules import bias_update_speed, learning_rate


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


def compute_dtype(run: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of activations: `train.dtype` with auto resolved."""
    return preferred_dtype(device) if run.train.dtype == "auto" else getattr(torch, run.train.dtype)


class Trainer:
    """Owns the model while it trains. Data, files and time are the loop's business.

    `part` says what of it is this process's (part.py), by default everything; `objective` what is minimised, by default
    the next token's loss.

    Raises:
        ConfigError: `train.device` is not there, or the objective needs what the layout divides.
    """

    def __init__(
        self,
        run: RunConfig,
        model: Transformer | None = None,
        part: Part | None = None,
        objective: Objective | None = None,
    ):
        self.run, self.part = run, part or Part()
        self.device = default_device() if run.train.device == "auto" else _device(run.train.device)
        self.dtype = compute_dtype(run, self.device)
        self.objective = objective or NextToken(run, self.dtype)
        if run.parallel.pp > 1 and not self.objective.stages:
            what = type(self.objective).__name__
            raise ConfigError(f"parallel.pp = {run.parallel.pp}: {what} needs the whole network; set parallel.pp = 1")
        if model is None:
            model = self.part.model(run.model).init_weights(run.train.seed)
        self.model = model
        fp8.apply(self.model, run.train.precision)
        self.part.attach(self.model, self.device)
        self.slices = self.part.slices(self.model)
        self.optimizer = build_optimizer(self.slices, run.optimizer, run.moments)
        c = run.model
        layers = range(c.num_hidden_layers + c.num_nextn_predict_layers)
        self.layers = [layer for layer in layers if c.is_moe_layer(layer)]  # of the whole network
        self.guard = SpikeGuard(run.train.spike_limit)
        self.ema = EMA(self.slices, run.optimizer.ema) if run.optimizer.ema else None

    def step(self, batch: Batch, step: int) -> StepResult:
        """Train on this part's rows of a step; `step` counts from 0 and sets the schedules. Waits for the device."""
        run = self.run
        batches = self.part.micro_batches(batch.to(self.device), run.train.micro_batch_size)
        self.model.zero_grad(set_to_none=True)
        sums, counts = self._accumulate(batches, step)
        own = sums[0].clone()
        norms = self.part.reduce(self.slices, sums, counts)
        loss, mtp_loss, balance_loss, grad_norm = torch.cat((sums.double(), norms.total.view(1))).tolist()
        lr = learning_rate(run, step)
        culprit = reason = ""
        if not math.isfinite(loss + mtp_loss + balance_loss + grad_norm):
            culprit, statistics = find_nonfinite(self.model, self.part, lambda: self._accumulate(batches, step))
            reason = f"{culprit} is not finite ({statistics})"
        elif spike := self.guard.spike(loss):
            name, largest = norms.largest
            culprit = f"gradient of {name}"
            reason = f"{spike}; the largest gradient is the {culprit}, of norm {largest:.4g}"
            reason += self._whose(own / batch.share)
        else:
            scale = run.optimizer.clip / (grad_norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
            gradients = [g for s in self.slices.values() if (g := s.parameter.grad) is not None]
            if scale < 1 and gradients:
                torch._foreach_mul_(gradients, scale)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.part.stepped()
            update_biases(self.model, dict(zip(self.layers, counts, strict=True)), bias_update_speed(run, step))
            if self.ema:
                self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)
        loads = counts.cpu()
        by_layer = dict(zip(self.layers, loads, strict=True))
        violation = dict(zip(self.layers, max_violation(loads).tolist(), strict=True))
        return StepResult(loss, mtp_loss, balance_loss, grad_norm, lr, not reason, culprit, reason, by_layer, violation)

    def _whose(self, loss: Tensor) -> str:
        """The rank whose sequences have the largest loss, in words; "" if there is one rank."""
        each = self.part.gather(float(loss))
        largest = max(each)
        return f"; rank {each.index(largest)} has the largest loss, {largest:.4g}" if len(each) > 1 else ""

    def _accumulate(self, batches: list[Batch], step: int) -> tuple[Tensor, Tensor]:
        """Losses [3] and counts [layers, E] of this part; gradients add up in `.grad`."""
        sums, found = self.part.accumulate(self.model, batches, partial(self.forward, step=step))
        width = max(1, self.run.model.n_routed_experts)  # a dense network has no layers to count in
        counts = torch.zeros(len(self.layers), width, dtype=torch.int64, device=self.device)
        for row, layer in enumerate(self.layers):
            if layer in found:
                counts[row] = found[layer]
        return sums, counts

    def forward(self, batch: Batch, hidden: Tensor | None = None, stage: int = 0, *, step: int = 0) -> Losses:
        """The losses that step `step` would differentiate, of a batch on the device; of one `stage` of the model, which
        takes the `hidden` state [B, T, D] of the stage before."""
        return self.objective(self.model, batch, step, hidden, stage)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, float, int]:
        """Sums over a batch of this part's own: negative log-likelihood, MTP's, and the number of targets."""
        alone = dataclasses.replace(batch, sequences=len(batch)).to(self.device)
        main, mtp = self.part.evaluate(self.model, alone, self.forward).tolist()
        if batch.weights is not None:  # they are sums already
            return main, mtp, int(batch.weights.count_nonzero())
        targets = len(batch) * (batch.tokens.shape[1] - self.run.model.lookahead)
        return main * targets, mtp * targets, targets

    def nonfinite_weight(self) -> str | None:
        """The first weight that holds NaN or infinity, which no checkpoint may."""
        held = {name: s.parameter.detach() for name, s in self.slices.items()}
        norm = torch.nn.utils.get_total_norm(held.values())
        own = None if norm.isfinite() else next((n for n, p in held.items() if not bool(p.isfinite().all())), None)
        return next((name for name in self.part.gather(own) if name), None)

    # ---- state besides the model's own weights, by name ----

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments, step counts and EMA of the slices, named `exp_avg.NAME` and so on; references, not copies."""
        state = self.optimizer.state
        found = {f"{kind}.{n}": t for n, s in self.slices.items() for kind, t in state[s.parameter].items()}
        if self.ema:
            found |= {f"ema.{name}": value for name, value in self.ema.weights.items()}
        return found

    def pieces(self) -> tuple[list[Piece], list[Piece]]:
        """What this rank writes into a checkpoint: of the network's state dict, and of the state beside it."""
        weights = [piece for piece in self.part.pieces(self.model) if self.part.keeps(piece.name)]
        state = []
        for full, tensor in self.state_tensors().items():
            kind, _, name = full.partition(".")
            _, shape, start, first = self.slices[name]
            if kind == "step" and first and start == 0:
                state.append(Piece(full, (), 0, tensor))
            elif kind != "step" and first:
                state.append(Piece(full, shape, start, tensor))
        return weights, state

    def without_moments(self) -> list[str]:
        """Parameters of the network that no step has moved: nothing differentiated them."""
        moved = self.part.gather([name for name, s in self.slices.items() if self.optimizer.state[s.parameter]])
        return sorted(set(self.part.names(self.model)) - set().union(*moved))

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
        for name, (parameter, shape, start, _) in self.slices.items():
            own = {kind: f"{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq")}
            if kept.intersection(own.values()) or (without is not None and name not in without):
                step = _taken(left, own["step"], ()).read()
                if not (bool(step.isfinite()) and step >= 0):
                    raise CheckpointError(f"the checkpoint's {own['step']} is {step.item()}, not a number of steps")
                self.optimizer.state[parameter] = {"step": step.to(self.device)} | {
                    kind: _read(_taken(left, own[kind], shape), parameter, start).to(self.device, moments)
                    for kind in ("exp_avg", "exp_avg_sq")
                }
            if self.ema and averaged:
                average = _read(_taken(left, f"ema.{name}", shape), parameter, start)
                self.ema.weights[name] = average.to(self.device, torch.float32)
        known = set(self.part.names(self.model)) - self.slices.keys()  # of other ranks
        if foreign := [name for name in left if name.partition(".")[2] not in known]:
            raise CheckpointError(f"the checkpoint's {min(foreign)} belongs to no parameter{_and_more(len(foreign))}")


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


def _read(stored: Spread, parameter: Tensor, start: int) -> Tensor:
    """The values of a slice, in its shape."""
    return stored.read(start, start + parameter.numel()).view(parameter.shape)


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"train.device = {name!r}: {str(error).splitlines()[0]}") from None
