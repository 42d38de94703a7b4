"""The executor of pipeline schedules: runs what `planning/schedules.py` lists for a rank, on tensors.

One thread computes; messages travel beside it (links.py). The executor knows no model: the forward of the rank's
stages is handed to it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanseek.config import ConfigError
from leanseek.distributed.links import Form, Groups, Links
from leanseek.distributed.watch import phase
from leanseek.ops import WeightGradients
from leanseek.planning.schedules import Action, Message, Schedule, Span, Timeline, Times, build, forwards, simulate
from leanseek.training.balance import add_counts
from leanseek.training.objective import Losses
from leanseek.training.part import Forward, MicroBatch


class Place(NamedTuple):
    """Where in which pipeline this process stands."""

    ranks: int
    rank: int
    groups: Groups


class Pipeline:
    """One rank's part in the forward and backward of a batch.

    schedule: "1f1b", "zb1p" or "dualpipev". Hidden states are [b, T, width] of `dtype` for tokens [b, T + lookahead].
    copied: the embedding, on the first and the last rank where each holds one of its own. Its gradients are summed
    over both (Megatron#844), so that the copies stay equal (Megatron-Bridge#5380).
    trace: note when each action ran. On a GPU each is then waited for.
    """

    def __init__(
        self,
        schedule: str,
        place: Place,
        *,
        lookahead: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        copied: nn.Parameter | None = None,
        trace: bool = False,
    ):
        self.place, self.copied, self.trace = place, copied, trace
        self.lookahead, self.width, self.dtype, self.device = lookahead, width, dtype, device
        self.recorded: list[Span] = []  # with `trace`, actions of the latest `accumulate`, in seconds since the epoch
        self._schedule = functools.cache(functools.partial(build, schedule, place.ranks))
        self._forwards = functools.cache(functools.partial(forwards, place.ranks, two=schedule == "dualpipev"))

    def accumulate(self, batches: Sequence[MicroBatch], forward: Forward) -> tuple[Tensor, dict[int, Tensor]]:
        """Add a batch's gradients to the parameters' `grad`. All ranks of the pipeline call it alike.

        Returns what `Part.accumulate` does, of this rank's stages.

        Raises:
            ConfigError: the schedule needs more micro-batches, or they differ in size.
        """
        batch = self._run(self._schedule(len(batches)), batches, forward)
        if self.copied is not None:
            assert self.copied.grad is not None, "both stages read the embedding"
            other = self.place.ranks - 1 - self.place.rank
            self.copied.grad += batch.links.exchange(other, self.copied.grad)
        self.recorded = batch.recorded
        return batch.sums, batch.counts

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], forward: Forward) -> Tensor:
        """The losses of `accumulate`, of any number of micro-batches and without gradients."""
        return self._run(self._forwards(len(batches)), batches, forward).sums

    def _run(self, schedule: Schedule, batches: Sequence[MicroBatch], forward: Forward) -> _Batch:
        if len({tokens.shape for tokens, _ in batches}) > 1:
            sizes = ", ".join(str(tokens.shape[0]) for tokens, _ in batches)
            raise ConfigError(
                f"a pipeline's micro-batches must be of one size, not of {sizes} sequences: make train.batch_size a "
                "multiple of train.micro_batch_size times the data-parallel ranks"
            )
        batch = _Batch(self, schedule, batches, forward)
        for step in schedule.steps[self.place.rank]:
            for action in step:
                batch.run(action)
        batch.links.finish()
        return batch

    def timeline(self) -> Timeline:
        """What all ranks recorded of the latest `accumulate`, in seconds from the first start; every rank calls it.

        A pair is recorded as the two actions that it is made of. Clocks are the machines' own.
        """
        found: Timeline = []
        times = torch.tensor([span[1:] for span in self.recorded], dtype=torch.float64, device=self.device)
        micro_batches = 1 + max(span.step[0].micro for span in self.recorded)
        for rank, steps in enumerate(self._schedule(micro_batches).steps):
            actions = [action for step in steps for action in step]
            theirs = times if rank == self.place.rank else times.new_empty(len(actions), 2)
            with phase("the timeline"):
                dist.broadcast(theirs, group=self.place.groups[0], group_src=rank)
            found.append([Span((action,), *pair) for action, pair in zip(actions, theirs.tolist(), strict=True)])
        begin = min(own[0].start for own in found)
        return [[Span(step, start - begin, end - begin) for step, start, end in own] for own in found]

    def planned(self, recorded: Timeline) -> Timeline:
        """The plan of a timeline, with its mean times; a pair takes as long as its two actions."""
        spans = [(step[0], end - start) for own in recorded for step, start, end in own]
        mean = {kind: _mean([s for action, s in spans if action.kind == kind]) for kind in "FBIW"}
        whole = mean["B"] or mean["I"] + mean["W"]
        times = Times(mean["F"], whole, mean["W"], mean["F"] + whole)
        return simulate(self._schedule(1 + max(action.micro for action, _ in spans)), times)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class _Chunk(NamedTuple):
    """A stage's forward of one micro-batch, until its backward."""

    losses: Losses
    hidden: Tensor | None  # what it took
    later: WeightGradients | None  # where its backward comes in halves


class _Batch:
    """What is under way while a rank runs its list."""

    def __init__(self, pipeline: Pipeline, schedule: Schedule, batches: Sequence[MicroBatch], forward: Forward):
        self.schedule, self.batches, self.forward, self.trace = schedule, batches, forward, pipeline.trace
        _, rank, groups = pipeline.place
        size, length = batches[0].tokens.shape
        form = Form((size, length - pipeline.lookahead, pipeline.width), pipeline.dtype, pipeline.device)
        self.rank, self.links = rank, Links(schedule, rank, groups, form)
        self.stages = schedule.stages_of(rank)
        self.halved = {a[1:] for step in schedule.steps[rank] for a in step if a.kind == "I"}
        self.chunks: dict[tuple[int, int], _Chunk] = {}
        self.later: dict[tuple[int, int], WeightGradients] = {}
        self.here: dict[Message, Tensor] = {}  # what one of the rank's stages has made for the other
        self.sums = torch.zeros(3, device=pipeline.device)
        self.counts: dict[int, Tensor] = {}
        self.recorded: list[Span] = []

    def run(self, action: Action) -> None:
        """Wait for what an action needs, compute, and send on what it gives."""
        kind, stage, micro = action
        before, after = (stage - 1, stage + 1) if kind == "F" else (stage + 1, stage - 1)
        message = "F" if kind == "F" else "B"
        taken = None if kind == "W" else self._take(Message(message, stage, micro), before)
        start = self._now()
        if kind == "W":
            self.later.pop((stage, micro)).compute()
            made = None
        else:
            made = (self._forward if kind == "F" else self._backward)(stage, micro, taken)
        if self.trace:
            self.recorded.append(Span((action,), start, self._now()))
        if made is not None:
            self._give(Message(message, after, micro), made)

    def _forward(self, stage: int, micro: int, hidden: Tensor | None) -> Tensor | None:
        tokens, share = self.batches[micro]
        later = WeightGradients() if (stage, micro) in self.halved else None
        if hidden is not None:
            hidden.requires_grad_(torch.is_grad_enabled())
        with later or contextlib.nullcontext():
            found = self.forward(tokens, hidden, self.stages.index(stage))
        if share:
            add_counts(self.counts, found.routes)
        self.sums += torch.stack((found.main, found.mtp, found.balance)).detach() * share
        if torch.is_grad_enabled():
            self.chunks[stage, micro] = _Chunk(found, hidden, later)
        return None if found.hidden is None else found.hidden.detach()

    def _backward(self, stage: int, micro: int, gradient: Tensor | None) -> Tensor | None:
        losses, hidden, later = self.chunks.pop((stage, micro))
        with later or contextlib.nullcontext():
            losses.backward(self.batches[micro].share, gradient)
        if later:
            self.later[stage, micro] = later
        return None if hidden is None else hidden.grad

    def _take(self, message: Message, maker: int) -> Tensor | None:
        """A message from the stage `maker`; None where there is no such stage."""
        if not 0 <= maker < self.schedule.stages:
            return None
        rank = self.schedule.rank_of(maker)
        return self.here.pop(message) if rank == self.rank else self.links.receive(rank, message)

    def _give(self, message: Message, tensor: Tensor) -> None:
        rank = self.schedule.rank_of(message.stage)
        if rank == self.rank:
            self.here[message] = tensor
        else:
            self.links.send(rank, message, tensor)

    def _now(self) -> float:
        if self.trace and self.sums.is_cuda:
            torch.cuda.synchronize()
        return time.time()
