"""The loss: next token, tokens further ahead (eq. 24, 25), and the balance losses (eq. 17)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.model import Output, Route, Transformer, sequence_balance_loss, switch_balance_loss


class Losses(NamedTuple):
    """All means over tokens, float32 scalars; `total` is what is differentiated.

    On a pipeline stage, `balance` covers its own layers; main and mtp are 0 except on the last stage. Sums over the
    stages are the whole network's.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor  # mean over the depths, before λ
    balance: Tensor  # after α
    routes: list[Route]  # of every MoE layer, the MTP modules' included
    hidden: Tensor | None  # what the next stage takes, [B, T, D]

    def backward(self, share: float = 1.0, gradient: Tensor | None = None) -> None:
        """Differentiate share · total, and together with it `hidden`, whose `gradient` the next stage has sent.

        So each stage adds the gradients of its own balance loss, which has no path to the loss of the last.
        """
        ends = [(self.total, self.total.new_tensor(share)), (self.hidden, gradient)]
        roots, gradients = zip(*[(end, g) for end, g in ends if end is not None and end.requires_grad], strict=True)
        torch.autograd.backward(roots, gradients)


def losses(
    model: Transformer,
    tokens: Tensor,
    hidden: Tensor | None = None,
    *,
    mtp_weight: float = 0.0,
    sequence_alpha: float = 0.0,
    switch_alpha: float = 0.0,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
    stage: int = 0,
) -> Losses:
    """tokens [B, T + lookahead] int64: inputs, and the targets behind them; hidden of the stage before, if any."""
    config = model.config
    inputs = tokens[:, : -config.lookahead] if hidden is None else hidden
    found: Output = model(inputs, tokens[:, 1:], dtype=dtype, recompute=recompute, stage=stage)
    nothing = torch.zeros((), device=tokens.device)
    main, *ahead = found.losses or [nothing]
    mtp = torch.stack(ahead).mean() if ahead else nothing  # eq. 25: 1/D Σ
    balance, batch = nothing, tokens.shape[0]
    if found.routes and sequence_alpha:
        each = [sequence_balance_loss(r, batch, config.num_experts_per_tok) for r in found.routes]
        balance = balance + sequence_alpha * sum(each)
    if found.routes and switch_alpha:
        balance = balance + switch_alpha * sum(switch_balance_loss(r) for r in found.routes)
    return Losses(main + mtp_weight * mtp + balance, main, mtp, balance, found.routes, found.hidden)
