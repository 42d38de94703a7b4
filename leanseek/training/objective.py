"""The loss: next token, tokens further ahead (eq. 24, 25), and the balance losses (eq. 17)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from leanseek.data.batch import Batch
from leanseek.model import (
    Lengths,
    Output,
    Route,
    Transformer,
    membership,
    sample_balance_loss,
    sequence_balance_loss,
    switch_balance_loss,
    without_padding,
)


class Losses(NamedTuple):
    """A micro-batch's parts of the step's losses, float32 scalars that add up; `total` is what is differentiated.

    On a pipeline stage, `balance` covers its own layers; main and mtp are 0 except on the last stage. Sums over the
    stages are the whole network's.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor  # mean over the depths, before λ
    balance: Tensor  # after α
    routes: list[Route]  # of every MoE layer, the MTP modules' included
    hidden: Tensor | None  # what the next stage takes, [B, T, D]

    def backward(self, gradient: Tensor | None = None) -> None:
        """Differentiate `total`, and together with it `hidden`, whose `gradient` the next stage has sent.

        So each stage adds the gradients of its own balance loss, which has no path to the loss of the last.
        """
        ends = [(self.total, None), (self.hidden, gradient)]
        roots, gradients = zip(*[(end, g) for end, g in ends if end is not None and end.requires_grad], strict=True)
        torch.autograd.backward(roots, gradients)


class Objective(Protocol):
    """What a run minimises."""

    stages: bool  # whether it works on a stage of a network, as pipelines need

    def __call__(
        self, model: Transformer, batch: Batch, step: int, hidden: Tensor | None = None, stage: int = 0
    ) -> Losses:
        """The losses of a micro-batch of step `step` (from 0), on the model's device."""

    def figures(self) -> dict[str, float]:
        """What else the step just done has to say in its row of metrics.jsonl."""


def losses(
    model: Transformer,
    tokens: Tensor,
    hidden: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    lengths: Lengths | None = None,
    share: float = 1.0,
    mtp_weight: float = 0.0,
    sequence_alpha: float = 0.0,
    switch_alpha: float = 0.0,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
    stage: int = 0,
) -> Losses:
    """`share` of the means over tokens [B, T + lookahead] int64: inputs, and the targets behind them.

    hidden: of the stage before, if any. weights, lengths: as in Batch. With weights, main and mtp are sums by them, of
    which `share` is not taken. Padding is in no loss, and not in the routes.
    """
    config = model.config
    inputs = tokens[:, : -config.lookahead] if hidden is None else hidden
    after = None if weights is None else weights[:, 1:]
    options = {"dtype": dtype, "recompute": recompute, "stage": stage, "lengths": lengths}
    found: Output = model(inputs, tokens[:, 1:], weights=after, **options)
    nothing = torch.zeros((), device=tokens.device)
    main, *ahead = found.losses or [nothing]
    mtp = torch.stack(ahead).mean() if ahead else nothing  # eq. 25: 1/D Σ
    balance, routes = nothing, found.routes if lengths is None else without_padding(found.routes, lengths)
    if routes and sequence_alpha:
        balance = balance + sequence_alpha * _sequence_balance(routes, inputs, lengths, config.num_experts_per_tok)
    if routes and switch_alpha:
        balance = balance + switch_alpha * sum(switch_balance_loss(r) for r in routes)
    if weights is None:
        total = (main + mtp_weight * mtp + balance) * share
        return Losses(total, main * share, mtp * share, balance * share, routes, found.hidden)
    total = main + mtp_weight * mtp + balance * share
    return Losses(total, main, mtp, balance * share, routes, found.hidden)


def _sequence_balance(routes: list[Route], inputs: Tensor, lengths: Lengths | None, top_k: int) -> Tensor | float:
    """Of all layers; of packed samples the mean over the positions of inputs [B, T, ...], padding's part being 0."""
    rows, length = inputs.shape[:2]
    if lengths is None:
        return sum(sequence_balance_loss(r, rows, top_k) for r in routes)
    members = membership(lengths, inputs.device)
    return sum(sample_balance_loss(r, members, top_k) for r in routes) / (rows * length)
