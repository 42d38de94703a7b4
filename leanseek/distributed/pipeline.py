"""The executor of pipeline schedules: runs what `planning/schedules.py` lists for a rank, on tensors.

One thread computes; messages travel beside it (links.py). The executor knows no model: the forward of the rank's
stages is handed to it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.distributed.links import Form, Groups, Links
from leanseek.distributed.turns import Turns
from leanseek.distributed.watch import phase
from leanseek.ops import WeightGradients
from leanseek.planning.schedules import (
    Action,
    Message,
    Schedule,
    Span,
    Step,
    Timeline,
    build,
    forwards,
    measured,
    simulate,
)
from leanseek.training.balance import add_counts
from leanseek.training.objective import Losses
from leanseek.training.part import Forward


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
    overlap: the two of a pair take turns at the exchanges between the ranks of expert parallelism (turns.py).
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
        overlap: bool = False,
        trace: bool = False,
    ):
        self.place, self.copied, self.trace = place, copied, trace
        self.thread = ThreadPoolExecutor(max_workers=1) if overlap else None
        self.lookahead, self.width, self.dtype, self.device = lookahead, width, dtype, device
        self.recorded: list[Span] = []  # with `trace`, steps of the latest `accumulate`, in seconds since the epoch
        self.micro_batches = 0  # of the latest `accumulate`
        self._schedule = functools.cache(functools.partial(build, schedule, place.ranks))
        self._forwards = functools.cache(functools.partial(forwards, place.ranks, two=schedule == "dualpipev"))

    def accumulate(self, batches: Sequence[Batch], forward: Forward) -> tuple[Tensor, dict[int, Tensor]]:
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
        self.recorded, self.micro_batches = batch.recorded, len(batches)
        return batch.sums, batch.counts

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], forward: Forward) -> Tensor:
        """The losses of `accumulate`, of any number of micro-batches and without gradients."""
        return self._run(self._forwards(len(batches)), batches, forward).sums

    def _run(self, schedule: Schedule, batches: Sequence[Batch], forward: Forward) -> _Batch:
        if len({batch.tokens.shape for batch in batches}) > 1:
            sizes = ", ".join(str(len(batch)) for batch in batches)
            raise ConfigError(
                f"a pipeline's micro-batches must be of one size, not of {sizes} sequences: make train.batch_size a "
                "multiple of train.micro_batch_size times the data-parallel ranks"
            )
        batch = _Batch(self, schedule, batches, forward)
        for step in schedule.steps[self.place.rank]:
            if len(step) == 2 and self.thread:
                batch.overlap(*step, self.thread)
            else:
                for action in step:
                    batch.run(action)
        batch.links.finish()
        return batch

    def timeline(self) -> Timeline:
        """What all ranks recorded of the latest `accumulate`, in seconds from the first start; every rank calls it.

        A pair that does not overlap is recorded as two steps. Clocks are the machines' own.
        """
        found: Timeline = []
        times = torch.tensor([span[1:] for span in self.recorded], dtype=torch.float64, device=self.device)
        schedule = self._schedule(self.micro_batches)
        for rank in range(self.place.ranks):
            ran = schedule.steps[rank] if self.thread else [(action,) for action in schedule.actions(rank)]
            theirs = times if rank == self.place.rank else times.new_empty(len(ran), 2)
            with phase("the timeline"):
                dist.broadcast(theirs, group=self.place.groups[0], group_src=rank)
            found.append([Span(step, *pair) for step, pair in zip(ran, theirs.tolist(), strict=True)])
        begin = min(own[0].start for own in found)
        return [[Span(step, start - begin, end - begin) for step, start, end in own] for own in found]

    def draw(self, out: Path) -> None:
        """Draw the timeline of the latest `accumulate` into `out`, if it was recorded: as planned from its steps' mean
        times, and as run. Every rank calls it, and the first one draws."""
        if not self.recorded:
            return
        ran = self.timeline()
        if self.place.rank == 0:
            schedule = self._schedule(self.micro_batches)
            title = f"{schedule.name}, {schedule.ranks} ranks, {schedule.micro_batches} micro-batches, seconds"
            plan = simulate(schedule, measured(ran))
            from leanseek.planning.timeline import draw  # matplotlib takes a second to import

            draw({f"{title}, as planned": plan, f"{title}, as run": ran}, out)


class _Chunk(NamedTuple):
    """A stage's forward of one micro-batch, until its backward."""

    losses: Losses
    hidden: Tensor | None  # what it took
    later: WeightGradients | None  # where its backward comes in halves


class _Batch:
    """What is under way while a rank runs its list."""

    def __init__(self, pipeline: Pipeline, schedule: Schedule, batches: Sequence[Batch], forward: Forward):
        self.schedule, self.batches, self.forward, self.trace = schedule, batches, forward, pipeline.trace
        _, rank, groups = pipeline.place
        size, length = batches[0].tokens.shape
        form = Form((size, length - pipeline.lookahead, pipeline.width), pipeline.dtype, pipeline.device)
        self.rank, self.links = rank, Links(schedule, rank, groups, form)
        self.stages = schedule.stages_of(rank)
        self.deferred = {a[1:] for a in schedule.actions(rank) if a.kind == "I"}
        if pipeline.thread:
            self.deferred |= {step[1][1:] for step in schedule.steps[rank] if len(step) == 2}
        self.chunks: dict[tuple[int, int], _Chunk] = {}
        self.later: dict[tuple[int, int], WeightGradients] = {}
        self.here: dict[Message, Tensor] = {}  # what one of the rank's stages has made for the other
        self.sums = torch.zeros(3, device=pipeline.device)
        self.counts: dict[int, Tensor] = {}
        self.recorded: list[Span] = []

    def run(self, action: Action) -> None:
        """Wait for what an action needs, compute, and send on what it gives."""
        taken = self._take(action)
        start = self._now()
        made = self._compute(action, taken)
        self._record((action,), start)
        self._give(action, made)

    def overlap(self, forward: Action, backward: Action, thread: ThreadPoolExecutor) -> None:
        """The same of two actions that take turns."""
        hidden, gradient = self._take(forward), self._take(backward)
        start = self._now()
        later = self.chunks[backward[1:]].later
        assert later is not None
        halves = functools.partial(self._compute, forward, hidden), functools.partial(self._compute, backward, gradient)
        state, sent_back = Turns(later).run(*halves, thread)
        del self.later[backward[1:]]  # computed on the way
        self._record((forward, backward), start)
        self._give(forward, state)
        self._give(backward, sent_back)

    def _compute(self, action: Action, taken: Tensor | None) -> Tensor | None:
        kind, stage, micro = action
        if kind == "F":
            return self._forward(stage, micro, taken)
        if kind == "W":
            return self.later.pop((stage, micro)).compute()
        return self._backward(stage, micro, taken)

    def _forward(self, stage: int, micro: int, hidden: Tensor | None) -> Tensor | None:
        batch = self.batches[micro]
        later = WeightGradients() if (stage, micro) in self.deferred else None
        if hidden is not None:
            hidden.requires_grad_(torch.is_grad_enabled())
        with later or contextlib.nullcontext():
            found = self.forward(batch, hidden, self.stages.index(stage))
        if batch.sequences:
            add_counts(self.counts, found.routes)
        self.sums += torch.stack((found.main, found.mtp, found.balance)).detach()
        if torch.is_grad_enabled():
            self.chunks[stage, micro] = _Chunk(found, hidden, later)
        return None if found.hidden is None else found.hidden.detach()

    def _backward(self, stage: int, micro: int, gradient: Tensor | None) -> Tensor | None:
        losses, hidden, later = self.chunks.pop((stage, micro))
        with later or contextlib.nullcontext():
            losses.backward(gradient)
        if later:
            self.later[stage, micro] = later
        return None if hidden is None else hidden.grad

    def _take(self, action: Action) -> Tensor | None:
        """What an action needs of another stage, if anything."""
        if not (needed := self.schedule.needs(action)):
            return None
        rank, message = needed
        return self.here.pop(message) if rank == self.rank else self.links.receive(rank, message)

    def _give(self, action: Action, made: Tensor | None) -> None:
        """Hand on what an action made for another stage, if anything."""
        if not (given := self.schedule.gives(action)):
            return
        assert made is not None
        rank, message = given
        if rank == self.rank:
            self.here[message] = made
        else:
            self.links.send(rank, message, made)

    def _record(self, step: Step, start: float) -> None:
        if self.trace:
            self.recorded.append(Span(step, start, self._now()))

    def _now(self) -> float:
        if self.trace and self.sums.is_cuda:
            torch.cuda.synchronize()
        return time.time()
