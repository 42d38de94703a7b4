"""Tokens travel to the ranks of their experts and back (3.2.2): the two all-to-alls of expert parallelism.

A token goes to each rank once, however many of its experts are there, with their numbers and its gate values, which
are applied at the expert. What comes back is one row from each rank; they are summed in float32. Between nodes there
are two hops, each of which is such an exchange: to the same place on every node that has an expert of the token, then
to the ranks there.

Each exchange has two steps, so that something else can run between them: rows leave, rows arrive. Backward it is the
same exchange the other way round: it needs no sizes, and a rank enters it also with nothing to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from leanseek.distributed.watch import phase
from leanseek.ops import Dispatched, expert_combine, expert_dispatch, quantize
from leanseek.ops.experts import combine_rows
from leanseek.ops.operands import FP8, Kept


class Peers:
    """The ranks of one hop: the p-th serves, or leads to, the experts from p · `experts` on.

    `sent_bytes`: to other ranks so far. `layer`: whose experts they are, for `watch`.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int, layer: int | None = None):
        self.group, self.experts, self.size, self.layer = group, experts, dist.get_world_size(group), layer
        self.sent_bytes = 0

    def send(self, rows: Tensor, out: list[int], into: list[int], what: str) -> Flight:
        """Start to send rows [sum(out), ...], out[p] of them to peer p, and to receive into[p] from it."""
        arriving = rows.new_empty(sum(into), *rows.shape[1:])
        work = dist.all_to_all_single(arriving, rows.contiguous(), into, out, group=self.group, async_op=True)
        others = rows.shape[0] - out[dist.get_rank(self.group)]
        self.sent_bytes += others * rows[:1].numel() * rows.element_size()
        return Flight(work, arriving, rows, phase(what, self.layer, "exchange"))

    def swap(self, counts: Tensor) -> Tensor:
        """counts [peers, n]: a row for each peer -> the row that each peer had for this rank."""
        ones = [1] * self.size
        return self.send(counts, ones, ones, "the counts").land()


class Flight(NamedTuple):
    """Rows under way, and those that left, whose memory must stay."""

    work: dist.Work
    arriving: Tensor
    leaving: Tensor
    waiting: phase

    def land(self) -> Tensor:
        with self.waiting:
            self.work.wait()
        return self.arriving


class Addresses(NamedTuple):
    """Which rows go to which peer, and what they say of themselves."""

    token: Tensor  # [S] int64, the token of each row, by peer, then token
    place: Tensor  # [N·K] int64, the row of each choice; -1 where the row of an earlier choice carries it, or none
    experts: Tensor  # [S, K] int64, the experts as the peer numbers them; those of other peers have its last + 1
    counts: Tensor  # [P, 2] int64: rows for each peer, and choices in them


def addresses(indices: Tensor, peers: int, experts: int) -> Addresses:
    """indices [N, K] of experts, `experts` of them at each of the peers; peers · experts stands for none of them."""
    peer = indices // experts
    goes = torch.zeros(peers + 1, indices.shape[0], dtype=torch.bool, device=indices.device)
    goes = goes.scatter_(0, peer.t(), True)[:peers]  # [P, N]
    row = goes.flatten().cumsum(0).view_as(goes) - 1  # where goes
    to, token = goes.nonzero(as_tuple=True)
    carried = (peer[:, :, None] == peer[:, None, :]).tril(-1).any(-1)  # [N, K]
    place = row.gather(0, peer.t().clamp(max=peers - 1)).t().masked_fill(carried | (peer == peers), -1)
    there = indices[token] - to[:, None] * experts
    choices = torch.zeros(peers + 1, dtype=torch.int64, device=indices.device)
    choices = choices.scatter_add_(0, peer.flatten(), torch.ones_like(peer).flatten())[:peers]
    return Addresses(
        token, place.flatten(), there.where((there >= 0) & (there < experts), experts),
        torch.stack((goes.sum(1), choices), dim=1),
    )  # fmt: skip


class Trip:
    """One hop of N tokens, there and back. `fp8`: rows on their way there are in 1×128 tiles (3.3.2), forward and
    backward; those on their way back, sums, are never."""

    def __init__(self, peers: Peers, indices: Tensor, fp8: bool):
        """Asks the peers how much will come; waits for them, and for the device."""
        self.peers, self.fp8, self.tokens = peers, fp8, indices.shape[0]
        self.token, self.place, self.experts, counts = addresses(indices, peers.size, peers.experts)
        with phase("the counts", peers.layer, "device" if counts.is_cuda else "exchange"):
            (self.out, _), (self.into, choices) = torch.stack((counts, peers.swap(counts))).transpose(1, 2).tolist()
        self.choices = sum(choices)  # that came here
        self._flights: list[Flight] = []

    def there(self, *of_tokens: Tensor) -> None:
        """Send what belongs to the tokens, [N, ...] each."""
        rows = (t.index_select(0, self.token) for t in of_tokens)
        self._flights = [self.peers.send(t, self.out, self.into, "dispatch") for t in rows]

    def back(self, *of_rows: Tensor) -> None:
        """Send what belongs to the rows that came here, [R, ...] each."""
        self._flights = [self.peers.send(t, self.into, self.out, "combine") for t in of_rows]

    def land(self) -> list[Tensor]:
        flights, self._flights = self._flights, []
        return [flight.land() for flight in flights]

    def summed(self, rows: Tensor) -> Tensor:
        """The sum of each token's rows: [S, ...] -> [N, ...]."""
        return combine_rows(rows, self.place, self.tokens)


# Autograd runs backward what was called last, first. So a layer's compute between leaving and arriving runs between
# them backward too. The tensor that links the two functions is empty: what is under way cannot be touched.


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, trip):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        trip.there(pack(x, trip.fp8), weights)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        # only the row that carried a gate value has a gradient for it
        return *map(ctx.trip.summed, ctx.trip.land()), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, trip, width):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        rows, weights = trip.land()
        return unpack(rows, width, ticket.dtype, trip.fp8), weights

    @staticmethod
    def backward(ctx, rows, weights):  # type: ignore[no-untyped-def]
        ctx.trip.back(rows, weights)
        return rows.new_empty(0), None, None


class _LeaveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, trip):  # type: ignore[no-untyped-def]
        ctx.trip, ctx.width = trip, rows.shape[1]
        trip.back(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, ticket):  # type: ignore[no-untyped-def]
        (rows,) = ctx.trip.land()
        return unpack(rows, ctx.width, ticket.dtype, ctx.trip.fp8), None


class _ArriveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, trip):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        (rows,) = trip.land()
        return trip.summed(rows)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.trip.there(pack(grad, ctx.trip.fp8))
        return grad.new_empty(0), None


def pack(x: Tensor, fp8: bool) -> Tensor:
    """x [N, D] as it travels: itself, or [N, D + ceil(D / 128)] bytes: codes, then the exponents of their scales."""
    if not fp8:
        return x
    _, kept = quantize.rows(x.contiguous(), True)
    exponents = (kept.scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return torch.cat((kept.codes.view(torch.uint8), exponents), dim=1)


def unpack(rows: Tensor, width: int, dtype: torch.dtype, fp8: bool) -> Tensor:
    """The inverse, [R, width]: exact in BF16 too, and quantised again it is the same values."""
    if not fp8:
        return rows
    scales = (rows[:, width:].int() << 23).view(torch.float32)
    return quantize.wide(Kept(rows[:, :width].view(FP8), scales), dtype)


class Dispatching:
    """Tokens under way to their experts."""

    def __init__(self, hops: Sequence[Peers], x: Tensor, indices: Tensor, weights: Tensor, fp8: bool):
        self.hops, self.width, self.fp8 = hops, x.shape[1], fp8
        self.trips: list[Trip] = []
        self._leave(x, indices, weights)

    def _leave(self, x: Tensor, indices: Tensor, weights: Tensor) -> None:
        trip = Trip(self.hops[len(self.trips)], indices, self.fp8)
        self.numbers = trip.peers.send(trip.experts, trip.out, trip.into, "dispatch")
        self.trips.append(trip)
        self.ticket = _Leave.apply(x, weights, trip)

    def wait(self) -> Dispatched:
        """The rows of this rank's experts, in their order; an expert's by source rank, then token."""
        while True:
            trip = self.trips[-1]
            indices = self.numbers.land()
            x, weights = _Arrive.apply(self.ticket, trip, self.width)
            if len(self.trips) == len(self.hops):
                self.sent = expert_dispatch(x, indices, weights, trip.peers.experts, trip.choices)
                return self.sent
            self._leave(x, indices, weights)

    def combine(self, rows: Tensor) -> Combining:
        """Start to send back the experts' results, rows [M, D] of what `wait` returned."""
        out = expert_combine(rows, self.sent)
        for trip in self.trips[:0:-1]:
            out = _ArriveBack.apply(_LeaveBack.apply(out, trip), trip)
        return Combining(_LeaveBack.apply(out, self.trips[0]), self.trips[0])


class Combining(NamedTuple):
    """Results under way to their tokens."""

    ticket: Tensor
    trip: Trip

    def wait(self) -> Tensor:
        """[N, D], the sum of each token's experts."""
        return _ArriveBack.apply(self.ticket, self.trip)


class Exchange:
    """Between the ranks of expert parallelism, the first of which serves the first experts.

    groups: all of them; for two hops, the ranks at this rank's place on every node, then the ranks of this node.
    fp8: rows travel to experts, and gradients to before the down-projection, in FP8 (3.3.2). layer: for `watch`.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup], experts: int, fp8: bool = False, layer: int | None = None):
        self.hops: list[Peers] = []
        self.fp8 = fp8
        for group in groups:
            experts //= dist.get_world_size(group)
            self.hops.append(Peers(group, experts, layer))

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> Dispatching:
        """Start to send x [N, D] to the experts [N, K] of each token, with their gate values [N, K] float32."""
        return Dispatching(self.hops, x, indices, weights, self.fp8)
