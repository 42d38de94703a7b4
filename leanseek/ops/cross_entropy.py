"""Cross entropy of a linear head that never holds the logits of all tokens at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.dispatch import op
from leanseek.ops.products import wide

CHUNK_LOGITS = 2**22  # logits computed at a time: 16 MiB in float32
GPU_CHUNKS = 32  # a GPU computes this many chunks at a time, to have more to do at once


@op("linear_cross_entropy")
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the tokens of -log softmax(hidden · weightᵀ)[target], float32 scalar.

    hidden [N, D]; weight [V, D] (cast to hidden's dtype); targets [N] int64, all counted. With weights [N] float32 it
    is the sum over the tokens of weight times loss.
    """
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, weights, need_grad)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in forward, a chunk of tokens at a time, so that each chunk's logits live only once."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, need: bool
    ) -> Tensor:
        dtype = hidden.dtype
        hidden, head = wide(hidden, weight.to(dtype))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need else None
        share = 1 / hidden.shape[0] if weights is None else 1.0
        rows = max(1, CHUNK_LOGITS * (GPU_CHUNKS if hidden.is_cuda else 1) // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows]
            logits = F.linear(part, head)
            lost, grad = softmax_cross_entropy(logits, target, share, need)
            if weights is not None:
                each = weights[start : start + rows]
                lost, grad = lost * each, grad.mul_(each[:, None]) if need else grad
            total += lost.sum()
            if grad_hidden is not None and grad_weight is not None:
                torch.mm(grad, head, out=grad_hidden[start : start + rows])
                grad_weight.addmm_(grad.t(), part) if grad.dtype == torch.float32 else grad_weight.add_(grad.t() @ part)
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden.to(dtype), grad_weight)
        return total if weights is not None else total / hidden.shape[0]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # in place: another [V, D] would be a step's largest tensor; torch refuses a second backward
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight.mul_(grad), None, None, None


@op("softmax_cross_entropy")
def softmax_cross_entropy(logits: Tensor, targets: Tensor, share: float, need: bool) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[target] of each row, [R] float32, and with `need` `share` times its gradient in the place of
    logits [R, V] and their dtype."""
    most, target = logits.amax(-1, keepdim=True), targets[:, None]
    lost = most.float() - logits.gather(1, target)
    wide = logits.float().sub_(most).exp_()  # the one [R, V] besides logits
    total = wide.sum(-1, keepdim=True)
    lost = (lost + total.log()).squeeze(1)
    if need:
        wide.div_(total)  # softmax
        wide.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide.dtype))
        logits.copy_(wide.mul_(share))
    return lost, logits
