"""The policy's log-probabilities: the sampler's own numbers, with a gradient.

A trainer and a server that each have a forward of their own disagree in the last bits, and a mixture of experts turns
such a bit into another expert. Here the forward of training *is* the engine's step over whole sequences
(`StepBackend.trace`), absorbed, row-invariant, on the weights being trained. So a token's log-probability has the bits
that it had when it was sampled, in whatever batch, with whatever drafts and cached pages; and what the rollouts went
through is not computed again where it was kept (states.py).

The backward goes layer by layer, as with recomputation: each layer runs again in the form that trains, from the state
with which it began in the engine and with the experts chosen there, and is differentiated. Only the states between
layers are kept. What sequences begin with in common is one row for all of them: a group's prompt is trained on once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leanseek import ops
from leanseek.backends import StepBackend
from leanseek.backends.protocol import Trace, trace
from leanseek.model import Route, Shared
from leanseek.model.block import Block
from leanseek.posttraining.policy import Policy
from leanseek.posttraining.states import ROOT, Tree

CHUNK_LOGITS = 2**22  # logits computed at a time: 16 MiB in float32


class Scored(NamedTuple):
    """Of each scored token."""

    logp: Tensor  # [M] float32, after temperature; with a gradient
    entropy: Tensor  # [M] float32, of the distribution it was drawn from
    hidden: Tensor  # [N, D] of all rows, after the final norm; without a gradient
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
        chunks, p = _chunks(len(tokens), head.shape[0]), None
        for rows in chunks:
            logits = logits_of(hidden[rows])
            warmth = torch.full((len(logits),), temperature, device=hidden.device)
            log_p = ops.logprobs(logits, warmth)
            logp[rows] = log_p.gather(1, tokens[rows, None]).squeeze(1)
            p = log_p.exp()
            entropy[rows] = -log_p.mul_(p).sum(-1)
        ctx.save_for_backward(hidden, head, tokens, p if len(chunks) == 1 else None)
        ctx.temperature, ctx.logits_of = temperature, logits_of
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        hidden, head, tokens, kept = ctx.saved_tensors
        weight = head.to(hidden.dtype)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros(head.shape, device=head.device)
        for rows in _chunks(len(tokens), head.shape[0]):
            share = (grad[rows] / ctx.temperature)[:, None]
            p = (ctx.logits_of(hidden[rows]) * (1 / ctx.temperature)).softmax(-1) if kept is None else kept
            p = (p * -share).scatter_add_(1, tokens[rows, None], share).to(hidden.dtype)
            grad_hidden[rows] = ops.linear(p, weight.t())
            grad_head += ops.linear(p.t(), hidden[rows].t())
        return grad_hidden, grad_head.to(head.dtype), None, None, None


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    step = max(1, CHUNK_LOGITS // vocab_size)
    return [slice(start, start + step) for start in range(0, rows, step)]


def score(
    policy: Policy, tokens: Tensor, lengths: Sequence[int], rows: Tensor, targets: Tensor, temperature: float
) -> Scored:
    """Log-probabilities of targets [M] int64 after rows [M] of whole sequences: tokens [N] int64, one after the other.

    The values are the policy's as a step backend; the gradients are its model's, computed in the policy's dtype.
    """
    model, dtype = policy.model, policy.dtype
    tree, samples = _distinct(tokens.tolist(), lengths)
    shared = Shared.of(samples, tokens.device)
    distinct = torch.tensor([row for sample in samples for row in sample], device=tokens.device)  # [N], of each token
    seen = policy.recall(tree) or _computed(policy.backend(), tokens, lengths, distinct)
    x = model.embed(torch.tensor([token for _, token in tree], device=tokens.device), dtype)
    cos, sin = model.rotary((shared.place % shared.rows.shape[1])[None])

    def again(number: int, chosen: Tensor | None) -> Callable[[Tensor], Tensor]:
        block = cast(Block, model.layers[number])
        return lambda x: block(x[None], cos, sin, False, chosen, shared)[0][0]

    x, routes = _Same.apply(x, seen.states[0].to(dtype)), []
    for layer, (state, experts) in enumerate(zip(seen.states[1:], seen.routes, strict=True)):
        chosen = experts if model.config.is_moe_layer(layer) else None
        x = _Value.apply(x, state.to(dtype), again(layer, chosen))
        if chosen is not None:
            none = chosen.new_empty(0, model.config.n_routed_experts)
            routes.append(Route(layer, chosen[distinct], none, none))
    hidden = _Value.apply(x, seen.hidden.to(dtype), model.norm)
    logits = policy.backend().logits
    logp, entropy = _TokenLogprobs.apply(hidden[distinct[rows]], model.head_weight, targets, temperature, logits)
    return Scored(logp, entropy, hidden.detach().index_select(0, distinct), routes)


def _distinct(tokens: Sequence[int], lengths: Sequence[int]) -> tuple[Tree, list[list[int]]]:
    """The rows of sequences, those that several begin with once; and the rows of each sequence."""
    tree, samples, end = Tree(), [], 0
    for length in lengths:
        before, rows = ROOT, []
        for token in tokens[end : end + length]:
            before = tree.add(before, token)
            rows.append(before)
        samples.append(rows)
        end += length
    return tree, samples


def _computed(backend: StepBackend, tokens: Tensor, lengths: Sequence[int], distinct: Tensor) -> Trace:
    """What the distinct rows go through."""
    found = trace(backend, tokens, lengths)
    pick = torch.empty(int(distinct.max()) + 1, dtype=torch.int64, device=tokens.device)
    pick[distinct] = torch.arange(len(distinct), device=tokens.device)  # any token of a row: they have the same bits
    return Trace(found.states.index_select(1, pick), found.routes.index_select(1, pick), found.hidden[pick])


class _Same(torch.autograd.Function):
    """`value`, with x's gradient: the two differ by rounding alone."""

    @staticmethod
    def forward(ctx, x, value):  # type: ignore[no-untyped-def]
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None
