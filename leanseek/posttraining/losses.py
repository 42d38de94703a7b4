"""The arithmetic of GRPO (5.2.2): advantages, the clipped loss in its forms, and the KL to a reference. Tensors alone.

Tokens of completions are flat, N of them: sequence after sequence, `lengths` of each. What a sequence's tokens weigh
(`token_weights`) holds the denominators of the whole optimizer step: a micro-batch's loss is a sum, and the gradient is
the same however the step is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

STD_EPS = 1e-4
CLIPS = {"paper": (0.2, 0.2), "dr": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}
LOSSES = tuple(CLIPS)
KLS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class Rule:
    """Which loss, and its constants.

    loss: "paper" (eq. 26: the mean over each sequence, then over sequences), "dr" (a constant divisor, Dr. GRPO),
    "dapo" (the mean over all tokens) or "gspo" (the ratio of whole sequences, normalised by length).
    kl: where β's term stands: "k1" in the reward, "k2" or "k3" (eq. 27) in the loss.
    """

    loss: str = "dr"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    kl: str = "k2"


class Figures(NamedTuple):
    """Sums over a micro-batch's tokens, float64 scalars without a gradient."""

    tokens: Tensor
    ratio: Tensor
    ratio_max: Tensor  # a maximum: not a sum
    clipped: Tensor
    kl: Tensor  # k1 to the reference, 0 without one
    mismatch: Tensor  # tokens whose log-probability is not the old one, bit for bit


# ---- rewards ----


def overlong_penalty(length: int, limit: int, room: int) -> float:
    """0 for answers up to limit - room tokens, falling to -1 at the limit (DAPO's soft penalty)."""
    return -min(1.0, max(0, length - (limit - room)) / room)


def spread(rewards: Tensor) -> Tensor:
    """Which groups of rewards [P, G] hold different ones, bool [P]; NaN is none."""
    return rewards.nan_to_num(-math.inf).amax(1) > rewards.nan_to_num(math.inf).amin(1)


def advantages(rewards: Tensor, divide_by_std: bool = False) -> Tensor:
    """rewards [P, G] -> r - mean of the group, [P, G] float64; eq. 28 with `divide_by_std`.

    A NaN abstains: its advantage is 0 and the others' mean is theirs alone. A group without spread has exact zeros.
    """
    known = ~rewards.isnan()
    count = known.sum(1, keepdim=True)
    centred = torch.where(known, rewards - rewards.nansum(1, keepdim=True) / count.clamp_min(1), 0.0)
    if divide_by_std:
        variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
        centred = centred / (variance.sqrt() + STD_EPS)
    return centred * spread(rewards)[:, None]


# ---- KL ----


def kl_terms(kind: str, logp: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy ‖ reference) at each token [N], from samples of the policy.

    k1 has the right mean; its gradient in a loss has the mean 0, so it belongs into the reward. k2's mean gradient is
    KL's. k3 (eq. 27) is never negative; its mean gradient is that of KL(reference ‖ policy).
    """
    gap = logp - reference
    if kind == "k1":
        return gap
    return gap.square() / 2 if kind == "k2" else (-gap).expm1() + gap


# ---- the loss ----


def owners(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The sequence of each of N tokens, int64."""
    return torch.repeat_interleave(torch.tensor(lengths, device=device))


def sums(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """values [N] summed over each sequence, [S]."""
    return values.new_zeros(len(lengths)).index_add(0, owners(lengths, values.device), values)


def token_weights(loss: str, lengths: Sequence[int], kept: Sequence[bool], longest: int) -> Tensor:
    """What each token of each sequence weighs in the step's loss, [S] float32, over all sequences of the step.

    Sequences that are not `kept` weigh nothing and stand in no denominator; with none kept all weights are 0. longest:
    tokens that a completion may have.
    """
    counted = max(1, sum(kept))
    tokens = max(1, sum(n for n, keep in zip(lengths, kept, strict=True) if keep))
    each = {
        "paper": [1 / (counted * max(1, n)) for n in lengths],
        "dr": [1 / (counted * longest)] * len(lengths),
        "dapo": [1 / tokens] * len(lengths),
    }["paper" if loss == "gspo" else loss]
    return torch.tensor(each) * torch.tensor(kept)


def policy_loss(
    rule: Rule,
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    weight: Tensor,
    lengths: Sequence[int],
    reference: Tensor | None = None,
) -> tuple[Tensor, Figures]:
    """eq. 26 with its sign turned, float32 scalar: this micro-batch's part of the step's; and what is told of it.

    logp, old, reference [N] float32: log-probabilities of the sampled tokens under the policy, under the sampler, under
    the reference; only logp has a gradient. advantage, weight [S] float32, of each sequence.
    """
    owner = owners(lengths, logp.device)
    gap = logp - old
    if rule.loss == "gspo":  # the geometric mean of a sequence's ratios
        gap = (sums(gap, lengths) / torch.tensor(lengths, device=gap.device).clamp_min(1))[owner]
    ratio, gain, counts = gap.exp(), advantage[owner], weight[owner]
    clipped = ratio.clamp(1 - rule.clip_low, 1 + rule.clip_high)
    each = -torch.minimum(ratio * gain, clipped * gain)
    if reference is not None and rule.beta and rule.kl != "k1":
        each = each + rule.beta * kl_terms(rule.kl, logp, reference)
    cut = (ratio * gain > clipped * gain) & (counts > 0)
    return (each * counts).sum(), _figures(logp, old, ratio, cut, counts > 0, reference)


@torch.no_grad()
def _figures(
    logp: Tensor, old: Tensor, ratio: Tensor, cut: Tensor, counted: Tensor, reference: Tensor | None
) -> Figures:
    """Of the tokens that are trained on."""
    wide = ratio[counted].double()
    kl = wide.new_zeros(()) if reference is None else (logp - reference)[counted].double().sum()
    largest = wide.max() if len(wide) else wide.new_zeros(())
    different = (logp != old) & counted
    return Figures(counted.sum().double(), wide.sum(), largest, cut.sum().double(), kl, different.sum().double())
