"""The policy's log-probabilities: the sampler's own numbers, with a gradient.

A trainer and a server that each have a forward of their own disagree in the last bits, and a mixture of experts turns
such a bit into another expert. Here the forward of training *is* the engine's step over whole sequences
(`StepBackend.trace`), absorbed, row-invariant, on the weights being trained. So a token's log-probability has the bits
that it had when it was sampled, in whatever batch, with whatever drafts and cached pages.

The backward goes layer by layer, as with recomputation: each layer runs again in the form that trains, from the state
with which it began in the engine and with the experts chosen there, and is differentiated. Only the states between
layers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leanseek import ops
from leanseek.backends import StepBackend
from leanseek.model import Route, Transformer
from leanseek.model.block import Block

CHUNK_LOGITS = 2**22  # logits computed at a time: 16 MiB in float32


class Scored(NamedTuple):
    """Of each scored token."""

    logp: Tensor  # [M] float32, after temperature; with a gradient
    entropy: Tensor  # [M] float32, of the distribution it was drawn from
    hidden: Tensor  # [N, D] of all rows, after the final norm
    routes: list[Route]  # of each MoE layer: where its tokens went, without scores


class _Value(torch.autograd.Function):
    """`value`, with the gradient of again(x), which is computed in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.again = again
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            torch.autograd.backward(ctx.again(start), grad)
        return start.grad, None, None


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / T)[token] of hidden [M, D] and its entropy, logits of a part of the rows at a time."""

    @staticmethod
    def forward(ctx, hidden, head, tokens, temperature, logits_of):  # type: ignore[no-untyped-def]
        logp, entropy = torch.empty(2, len(tokens), device=hidden.device)
        for rows in _chunks(len(tokens), head.shape[0]):
            logits = logits_of(hidden[rows])
            warmth = torch.full((len(logits),), temperature, device=hidden.device)
            logp[rows] = ops.token_logprobs(logits, tokens[rows], warmth)
            log_p = (logits * (1 / temperature)).log_softmax(-1)
            entropy[rows] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, head, tokens)
        ctx.temperature, ctx.logits_of = temperature, logits_of
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        hidden, head, tokens = ctx.saved_tensors
        weight = head.to(hidden.dtype)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros(head.shape, device=head.device)
        for rows in _chunks(len(tokens), head.shape[0]):
            share = (grad[rows] / ctx.temperature)[:, None]
            p = (ctx.logits_of(hidden[rows]) * (1 / ctx.temperature)).softmax(-1).mul_(-share)
            p.scatter_add_(1, tokens[rows, None], share)
            p = p.to(hidden.dtype)
            grad_hidden[rows] = ops.linear(p, weight.t())
            grad_head += ops.linear(p.t(), hidden[rows].t())
        return grad_hidden, grad_head.to(head.dtype), None, None, None


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    step = max(1, CHUNK_LOGITS // vocab_size)
    return [slice(start, start + step) for start in range(0, rows, step)]


def score(
    model: Transformer,
    backend: StepBackend,
    tokens: Tensor,
    lengths: Sequence[int],
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> Scored:
    """Log-probabilities of targets [M] int64 after rows [M] of whole sequences: tokens [N] int64, one after the other.

    The values are `backend`'s, which holds `model`'s weights; the gradients are `model`'s, computed in `dtype`.
    """
    seen = backend.trace(tokens, lengths)
    run = _Training(model, lengths, tokens.device)
    x, routes = model.embed(tokens, dtype), []
    x = _Same.apply(x, seen.states[0].to(dtype))
    for layer, (state, chosen) in enumerate(zip(seen.states[1:], seen.routes, strict=True)):
        x = _Value.apply(x, state.to(dtype), run.layer(layer, chosen))
        if chosen is not None:
            none = chosen.new_empty(0, model.config.n_routed_experts)
            routes.append(Route(layer, chosen, none, none))
    hidden = _Value.apply(x, seen.hidden.to(dtype), model.norm)
    logp, entropy = _TokenLogprobs.apply(hidden[rows], model.head_weight, targets, temperature, backend.logits)
    return Scored(logp, entropy, hidden, routes)


class _Same(torch.autograd.Function):
    """`value`, with x's gradient: the two differ by rounding alone."""

    @staticmethod
    def forward(ctx, x, value):  # type: ignore[no-untyped-def]
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


class _Training:
    """Layers in the form that trains, over sequences of `lengths`, as rows padded to the longest."""

    def __init__(self, model: Transformer, lengths: Sequence[int], device: torch.device):
        self.model, longest = model, max(lengths)
        count = torch.tensor(lengths, device=device)
        self.real = torch.arange(longest, device=device) < count[:, None]  # [S, T]
        self.cos, self.sin = model.rotary(torch.arange(longest, device=device)[None])

    def layer(self, number: int, chosen: Tensor | None) -> Callable[[Tensor], Tensor]:
        """x [N, D] -> the layer's output [N, D], with the experts `chosen` [N, K]."""
        block = cast(Block, self.model.layers[number])
        replay = None if chosen is None else self._padded(chosen).flatten(0, 1)

        def run(x: Tensor) -> Tensor:
            return block(self._padded(x), self.cos, self.sin, False, replay)[0][self.real]

        return run

    def _padded(self, x: Tensor) -> Tensor:
        """[N, ...] -> [S, T, ...]; what stands behind a sequence's end is seen by none of its tokens."""
        out = x.new_zeros(*self.real.shape, *x.shape[1:])
        out[self.real] = x
        return out
