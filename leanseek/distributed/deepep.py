"""DeepEP (V2, `ElasticBuffer`) in the place of our all-to-alls, where it is installed: NVLink and RDMA on CUDA.

Held to our own exchange in a test with a stand-in for the library, which needs Hopper GPUs: not run on one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanseek.ops import Dispatched, expert_combine, expert_dispatch, quantize
from leanseek.ops.operands import Kept


class DeepEP:
    """As `Exchange`, over one group of all ranks: DeepEP finds the nodes itself.

    tokens: the most that a rank ever sends at a time, the same on all ranks. x must be BF16.
    """

    def __init__(
        self, group: dist.ProcessGroup, experts: int, tokens: int, width: int, choices: int, fp8: bool = False
    ):
        from deep_ep import ElasticBuffer

        self.buffer = ElasticBuffer(
            group, num_max_tokens_per_rank=tokens, hidden=width, num_topk=choices, use_fp8_dispatch=fp8
        )
        self.experts, self.here, self.tokens, self.fp8 = experts, experts // dist.get_world_size(group), tokens, fp8
        self.sms = self.buffer.get_theoretical_num_sms(experts, choices)

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> Dispatching:
        flight = Flight(self)
        return Dispatching(flight, _Leave.apply(x, weights, indices, flight))

    def there(self, x: Tensor, **how: Any) -> tuple[Any, ...]:
        """Tokens to experts; with `handle`, along the way of an earlier call."""
        kept = quantize.rows(x.contiguous(), True)[1] if self.fp8 else None
        sent = x.contiguous() if kept is None else (kept.codes, kept.scales)
        return self.buffer.dispatch(sent, num_sms=self.sms, async_with_compute_stream=True, **how)

    def wide(self, rows: Any, dtype: torch.dtype) -> Tensor:
        return quantize.wide(Kept(*rows), dtype) if self.fp8 else rows

    def back(self, rows: Tensor, handle: Any, weights: Tensor | None = None) -> tuple[Any, ...]:
        return self.buffer.combine(
            rows.contiguous(), handle=handle, topk_weights=weights, num_sms=self.sms, async_with_compute_stream=True
        )


class Flight:
    """What is under way; `event` is when it has come."""

    def __init__(self, exchange: DeepEP):
        self.exchange, self.handle = exchange, None
        self._found: tuple[Any, ...] = ()

    def leave(self, *found: Any) -> None:
        self._found = found

    def land(self) -> tuple[Any, ...]:
        *found, event = self._found
        self._found = ()
        event.current_stream_wait()
        return tuple(found)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, indices, flight):  # type: ignore[no-untyped-def]
        ctx.flight, own = flight, flight.exchange
        *found, flight.handle, event = own.there(
            x, topk_idx=indices, topk_weights=weights, num_experts=own.experts, num_max_tokens_per_rank=own.tokens
        )
        flight.leave(*found, event)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        return *ctx.flight.land(), None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, flight):  # type: ignore[no-untyped-def]
        ctx.flight = flight
        rows, indices, weights = flight.land()
        ctx.mark_non_differentiable(indices)
        return flight.exchange.wide(rows, ticket.dtype), weights, indices

    @staticmethod
    def backward(ctx, rows, weights, _):  # type: ignore[no-untyped-def]
        flight = ctx.flight
        flight.leave(*flight.exchange.back(rows, flight.handle, weights))
        return rows.new_empty(0), None


class _LeaveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, flight):  # type: ignore[no-untyped-def]
        ctx.flight = flight
        out, _, event = flight.exchange.back(rows, flight.handle)
        flight.leave(out, event)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, ticket):  # type: ignore[no-untyped-def]
        (rows,) = ctx.flight.land()
        return ctx.flight.exchange.wide(rows, ticket.dtype), None


class _ArriveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, flight):  # type: ignore[no-untyped-def]
        ctx.flight = flight
        (out,) = flight.land()
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, *_, event = ctx.flight.exchange.there(grad, handle=ctx.flight.handle)
        ctx.flight.leave(rows, event)
        return grad.new_empty(0), None


class Dispatching:
    """As in `exchange`."""

    def __init__(self, flight: Flight, ticket: Tensor):
        self.flight, self.ticket = flight, ticket

    def wait(self) -> Dispatched:
        x, weights, indices = _Arrive.apply(self.ticket, self.flight)
        here, handle = self.flight.exchange.here, self.flight.handle
        indices = indices.where((indices >= 0) & (indices < here), here).long()
        rows = sum(handle.num_recv_tokens_per_expert_list)  # type: ignore[attr-defined]
        self.sent = expert_dispatch(x, indices, weights, here, rows)
        return self.sent

    def combine(self, rows: Tensor) -> Combining:
        return Combining(_LeaveBack.apply(expert_combine(rows, self.sent), self.flight), self.flight)


class Combining:
    """As in `exchange`."""

    def __init__(self, ticket: Tensor, flight: Flight):
        self.ticket, self.flight = ticket, flight

    def wait(self) -> Tensor:
        return _ArriveBack.apply(self.ticket, self.flight)
