"""Tokens travel to the ranks of their experts and back (3.2.2): the two all-to-alls of expert parallelism.

A token goes to each rank once, however many of its experts are there, with their numbers and its gate values, which
are applied at the expert. What comes back is one row from each rank; they are summed in float32. Between nodes there
are two hops, each of which is such an exchange: to the same place on every node that has an expert of the token, then
to the ranks there.

Each exchange has two steps, so that something else can run between them: rows leave, rows arrive. Backward it is the
same exchange the other way round: it needs no sizes, and a rank enters it also with nothing to send.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from leanseek.distributed.turns import give_way, started
from leanseek.ops import Dispatched, expert_combine, expert_dispatch, quantize
from leanseek.ops.experts import combine_rows
from leanseek.ops.formats import TILE
from leanseek.ops.operands import FP8, Kept


class Peers:
    """The ranks of one hop: the p-th serves, or leads to, the experts from p · `experts` on.

    `sent_bytes`: to other ranks so far; `waited`: seconds in which this process had nothing to do but wait for them.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int):
        self.group, self.experts = group, experts
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.sent_bytes, self.waited = 0, 0.0

    def send(self, rows: Tensor, out: list[int], into: list[int]) -> Flight:
        """Start to send rows [sum(out), ...], out[p] of them to peer p, and to receive into[p] from it."""
        arriving = rows.new_empty(sum(into), *rows.shape[1:])
        work = dist.all_to_all_single(arriving, rows, into, out, group=self.group, async_op=True)
        self.sent_bytes += (rows.shape[0] - out[self.rank]) * rows[:1].numel() * rows.element_size()
        return Flight(self, work, arriving, rows)

    def swap(self, counts: Tensor) -> Tensor:
        """counts [peers, n]: a row for each peer -> the row that each peer had for this rank."""
        ones = [1] * self.size
        return self.send(counts, ones, ones).land()


class Flight(NamedTuple):
    """Rows under way, and those that left, whose memory must stay."""

    peers: Peers
    work: dist.Work
    arriving: Tensor
    leaving: Tensor

    def land(self) -> Tensor:
        start = time.perf_counter()
        self.work.wait()
        self.peers.waited += time.perf_counter() - start
        return self.arriving


class Addresses(NamedTuple):
    """Which tokens go to which peer."""

    token: Tensor  # [S] int64, the token of each row that leaves, by peer, then token
    place: Tensor  # [N·K] int64, the row of each choice; -1 where the row of an earlier choice carries it, or none
    counts: Tensor  # [P, 2] int64: rows for each peer, and choices in them


def addresses(indices: Tensor, peers: int, experts: int) -> Addresses:
    """indices [N, K] of experts, `experts` of them at each of the peers; peers · experts stands for none of them."""
    peer = indices // experts
    goes = torch.zeros(peers + 1, indices.shape[0], dtype=torch.bool, device=indices.device)
    goes = goes.scatter_(0, peer.t(), True)[:peers]  # [P, N]
    row = goes.flatten().cumsum(0).view_as(goes) - 1  # where it goes
    carried = (peer[:, :, None] == peer[:, None, :]).tril(-1).any(-1)  # [N, K]
    place = row.gather(0, peer.t().clamp(max=peers - 1)).t().masked_fill(carried | (peer == peers), -1)
    choices = torch.zeros(peers + 1, dtype=torch.int64, device=indices.device)
    choices = choices.scatter_add_(0, peer.flatten(), torch.ones_like(peer).flatten())[:peers]
    return Addresses(goes.nonzero()[:, 1], place.flatten(), torch.stack((goes.sum(1), choices), dim=1))


class Trip:
    """One hop of N tokens, there and back. `fp8`: rows on their way there are in 1×128 tiles (3.3.2), forward and
    backward; those on their way back, sums, are never."""

    def __init__(self, peers: Peers, indices: Tensor, fp8: bool):
        """Asks the peers how much will come; waits for them, and for the device."""
        self.peers, self.fp8, (self.tokens, self.choices) = peers, fp8, indices.shape
        self.token, self.place, counts = addresses(indices, peers.size, peers.experts)
        (self.out, _), (self.into, chosen) = torch.stack((counts, peers.swap(counts))).transpose(1, 2).tolist()
        self.chosen = sum(chosen)  # the choices that come here
        self._flight: Flight | None = None

    def there(self, *of_tokens: Tensor) -> None:
        """Send what belongs to the tokens, [N, ...] each."""
        self._flight = self.peers.send(join(*of_tokens).index_select(0, self.token), self.out, self.into)

    def back(self, *of_rows: Tensor) -> None:
        """Send what belongs to the rows that came here, [R, ...] each."""
        self._flight = self.peers.send(join(*of_rows), self.into, self.out)

    def land(self, *kinds: tuple[int, torch.dtype]) -> list[Tensor]:
        """What was sent, with its columns and dtypes."""
        assert self._flight is not None, "nothing is under way"
        rows, self._flight = self._flight.land(), None
        return list(split(rows, *kinds))

    def summed(self, rows: Tensor) -> Tensor:
        """The sum of each token's rows: [S, ...] -> [N, ...]."""
        return combine_rows(rows, self.place, self.tokens)

    # x on its way there

    def packed(self, x: Tensor) -> tuple[Tensor, ...]:
        return pack(x) if self.fp8 else (x,)

    def kinds(self, width: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        return ((width, FP8), (-(-width // TILE), torch.uint8)) if self.fp8 else ((width, dtype),)

    def unpacked(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return unpack(parts[0], parts[1], dtype) if self.fp8 else parts[0]


def join(*parts: Tensor) -> Tensor:
    """[N, ...] each -> [N, bytes / 8] int64; every part begins at a multiple of 8 bytes."""
    rows = [_dense(part).view(torch.uint8) for part in parts]
    rows = [F.pad(part, (0, -part.shape[1] % 8)) if part.shape[1] % 8 else part for part in rows]
    return torch.cat(rows, dim=1).view(torch.int64)


def _dense(part: Tensor) -> Tensor:
    """Contiguous, also by its strides: a column alone may have any, and bytes are not seen through them."""
    return part if part.is_contiguous() and part.stride(-1) == 1 else part.clone(memory_format=torch.contiguous_format)


def split(rows: Tensor, *kinds: tuple[int, torch.dtype]) -> Iterator[Tensor]:
    """The inverse, for parts of so many columns of a dtype: views of rows."""
    plain, begin = rows.view(torch.uint8), 0
    for columns, dtype in kinds:
        end = begin + columns * dtype.itemsize
        yield plain[:, begin:end].view(dtype)
        begin = -(-end // 8) * 8


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D] in FP8: codes [N, D] and the exponents of their scales, [N, ceil(D / 128)] bytes."""
    _, kept = quantize.rows(x.contiguous(), True)
    return kept.codes, (kept.scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def unpack(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, [N, D]: exact in BF16 too, and quantised again it is the same values."""
    return quantize.wide(Kept(codes, (exponents.int() << 23).view(torch.float32)), dtype)


# Autograd runs backward what was called last, first. So a layer's compute between leaving and arriving runs between
# them backward too. The tensor that links the two functions is empty: what is under way cannot be touched.


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, indices, trip):  # type: ignore[no-untyped-def]
        ctx.trip, ctx.width = trip, x.shape[1]
        trip.there(weights, indices, *trip.packed(x))
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, ticket):  # type: ignore[no-untyped-def]
        trip = ctx.trip
        give_way()
        weights, rows = trip.land((trip.choices, torch.float32), (ctx.width, ticket.dtype))
        # of the rows of a token, the one that carried a gate value has its gradient, the others zeros
        return trip.summed(rows), trip.summed(weights), None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, trip, width):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        values, numbers = (trip.choices, torch.float32), (trip.choices, torch.int64)
        weights, indices, *x = trip.land(values, numbers, *trip.kinds(width, ticket.dtype))
        ctx.mark_non_differentiable(indices)
        return trip.unpacked(x, ticket.dtype), weights, indices

    @staticmethod
    def backward(ctx, rows, weights, _):  # type: ignore[no-untyped-def]
        ctx.trip.back(weights, rows)
        started()
        return rows.new_empty(0), None, None


class _LeaveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, trip):  # type: ignore[no-untyped-def]
        ctx.trip, ctx.width = trip, rows.shape[1]
        trip.back(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, ticket):  # type: ignore[no-untyped-def]
        give_way()
        return ctx.trip.unpacked(ctx.trip.land(*ctx.trip.kinds(ctx.width, ticket.dtype)), ticket.dtype), None


class _ArriveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, trip, width):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        give_way()
        (rows,) = trip.land((width, ticket.dtype))
        return trip.summed(rows)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.trip.there(*ctx.trip.packed(grad))
        started()
        return grad.new_empty(0), None, None


class Dispatching:
    """Tokens under way to their experts.

    `ticket` joins leaving and arriving in the graph. Who runs backward in segments, with other work between them, cuts
    the graph there: a leaf takes the ticket's place, and the ticket's backward waits for what the leaf's has sent.
    """

    def __init__(self, hops: Sequence[Peers], x: Tensor, indices: Tensor, weights: Tensor, fp8: bool):
        self.width, self.fp8 = x.shape[1], fp8
        self._further, self._trips = list(hops), list[Trip]()
        self._leave(x, indices, weights)

    def _leave(self, x: Tensor, indices: Tensor, weights: Tensor) -> None:
        trip = Trip(self._further.pop(0), indices, self.fp8)
        self._trips.append(trip)
        self.ticket = _Leave.apply(x, weights, indices, trip)

    def wait(self) -> Dispatched:
        """The rows of this rank's experts, in their order; an expert's by source rank, then token."""
        while True:
            give_way()
            trip = self._trips[-1]
            x, weights, indices = _Arrive.apply(self.ticket, trip, self.width)
            indices = indices - trip.peers.rank * trip.peers.experts
            indices = indices.where((indices >= 0) & (indices < trip.peers.experts), trip.peers.experts)
            if not self._further:
                self.sent = expert_dispatch(x, indices, weights, trip.peers.experts, trip.chosen)
                return self.sent
            self._leave(x, indices, weights)

    def combine(self, rows: Tensor) -> Combining:
        """Start to send back the experts' results, rows [M, D] of what `wait` returned."""
        out = expert_combine(rows, self.sent)
        for trip in self._trips[:0:-1]:
            out = Combining(_LeaveBack.apply(out, trip), trip, self.width).wait()
        return Combining(_LeaveBack.apply(out, self._trips[0]), self._trips[0], self.width)


class Combining(NamedTuple):
    """Results under way to their tokens; `ticket` as in `Dispatching`."""

    ticket: Tensor
    trip: Trip
    width: int

    def wait(self) -> Tensor:
        """[N, D], the sum of each token's experts."""
        return _ArriveBack.apply(self.ticket, self.trip, self.width)


class Exchange:
    """Between the ranks of expert parallelism, the first of which serves the first experts.

    groups: all of them; for two hops, the ranks at this rank's place on every node, then the ranks of this node.
    fp8: rows travel to experts, and gradients to before the down-projection, in FP8 (3.3.2).
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup], experts: int, fp8: bool = False):
        self.hops: list[Peers] = []
        self.fp8 = fp8
        for group in groups:
            experts //= dist.get_world_size(group)
            self.hops.append(Peers(group, experts))

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> Dispatching:
        """Start to send x [N, D] to the experts [N, K] of each token, with their gate values [N, K] float32."""
        return Dispatching(self.hops, x, indices, weights, self.fp8)
