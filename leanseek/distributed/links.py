"""Messages between the ranks of a pipeline."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from leanseek.distributed.watch import phase
from leanseek.planning.schedules import Message, Schedule

Groups = tuple[ProcessGroup, ProcessGroup]  # of the pipeline's ranks: for messages to higher ranks, to lower ranks


class Form(NamedTuple):
    """What every message is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class Links:
    """Sends and receives of one rank during one batch.

    Both ends of a link take its messages in one order, `Schedule.link`, and each direction has a group, and so a
    stream, of its own: no send waits behind a receive, and no receive behind a later one (pytorch#172668). Messages
    carry tags, because gloo checks neither dtype nor shape.
    """

    def __init__(self, schedule: Schedule, rank: int, groups: Groups, form: Form):
        self._schedule, self._rank, self._groups, self._form = schedule, rank, groups, form
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        neighbours = [other for other in (rank - 1, rank + 1) if 0 <= other < schedule.ranks]
        self._expected = {other: deque(schedule.link(other, rank)) for other in neighbours}
        self._posted: dict[int, dict[Message, tuple[dist.Work, Tensor]]] = {other: {} for other in neighbours}
        for other in neighbours:
            self._post(other)

    def send(self, to: int, message: Message, tensor: Tensor) -> None:
        """Start to send; the tensor is kept until it is gone. On gloo that is known at the end of the batch alone."""
        tensor = tensor.contiguous()
        assert (tensor.shape, tensor.dtype) == self._form[:2], (message, tensor.shape, tensor.dtype, self._form)
        work = dist.isend(tensor, group=self._groups[to < self._rank], tag=self._tag(message), group_dst=to)
        assert work is not None
        self._sent.append((work, tensor))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()

    def receive(self, sender: int, message: Message) -> Tensor:
        """Wait for a message. The next one of that link is on its way meanwhile."""
        posted = self._posted[sender]
        while message not in posted:
            self._post(sender)
        work, tensor = posted.pop(message)
        if not posted:
            self._post(sender)
        with phase(f"the {'hidden states' if message.kind == 'F' else 'gradients'} of micro-batch {message.micro}"):
            work.wait()
        return tensor

    def _post(self, sender: int) -> None:
        if not self._expected[sender]:
            return
        message, tensor = self._expected[sender].popleft(), self._form.empty()
        work = dist.irecv(tensor, group=self._groups[sender > self._rank], tag=self._tag(message), group_src=sender)
        assert work is not None
        self._posted[sender][message] = work, tensor

    def _tag(self, message: Message) -> int:
        kind, stage, micro = message
        return 2 * (micro * self._schedule.stages + stage) + (kind == "B")

    def exchange(self, other: int, tensor: Tensor) -> Tensor:
        """Swap tensors of one shape with another rank, after everything else."""
        self.finish()
        found, tag = torch.empty_like(tensor), 2 * self._schedule.stages * self._schedule.micro_batches
        out, back = self._groups if other > self._rank else self._groups[::-1]
        works = [dist.isend(tensor, group=out, tag=tag, group_dst=other)]
        works.append(dist.irecv(found, group=back, tag=tag, group_src=other))
        with phase("the other copy's gradients"):
            for work in works:
                assert work is not None
                work.wait()
        return found

    def finish(self) -> None:
        """Wait until all that was sent has gone."""
        with phase("the last messages of the pipeline"):
            while self._sent:
                self._sent.popleft()[0].wait()
