"""The objective of GRPO: a batch of completions -> the clipped loss, and the figures of its step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.data.batch import Batch
from leanseek.model import Transformer
from leanseek.model.layers import next_token_loss
from leanseek.posttraining.forward import Scored, score
from leanseek.posttraining.grpo_config import GRPORun
from leanseek.posttraining.losses import Figures, policy_loss
from leanseek.posttraining.policy import Policy
from leanseek.training.objective import Losses
from leanseek.training.schedules import mtp_weight


class Places(NamedTuple):
    """Where the completions of a batch stand; rows are [prompt, completion], padded."""

    real: Tensor  # bool [B, T], the inputs that are tokens
    scored: Tensor  # bool [B, T], those after which a completion's token comes
    lengths: list[int]  # inputs of each row
    counts: list[int]  # tokens of each completion


def places(batch: Batch) -> Places:
    """batch.columns["start"] [B]: the tokens of each prompt."""
    assert batch.lengths is not None
    lengths, start = [n for (n,) in batch.lengths], batch.columns["start"]
    place = torch.arange(batch.columns["old"].shape[1], device=start.device)
    real = place < torch.tensor(lengths, device=start.device)[:, None]
    scored = real & (place >= start[:, None] - 1)
    return Places(real, scored, lengths, [n - s + 1 for n, s in zip(lengths, start.tolist(), strict=True)])


def scored(policy: Policy, batch: Batch, where: Places, temperature: float) -> Scored:
    """The completions of a batch under a policy."""
    width = where.real.shape[1]
    rows = where.scored[where.real].nonzero().squeeze(1)
    targets = batch.tokens[:, 1 : width + 1][where.scored]
    tokens = batch.tokens[:, :width][where.real]
    return score(policy, tokens, where.lengths, rows, targets, temperature)


class PolicyGradient:
    """`attach` it to the policy before the first step."""

    stages = False

    def __init__(self, run: GRPORun):
        self.run, self._rule = run, run.grpo.rule
        self._policy: Policy | None = None
        self._step = -1
        self._sums = torch.zeros(0)

    def attach(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(
        self, model: Transformer, batch: Batch, step: int, hidden: Tensor | None = None, stage: int = 0
    ) -> Losses:
        """columns: "start" [B], "old" [B, T] and perhaps "reference" [B, T] (of the token after each input),
        "advantage" and "weight" [B], "tokens" [B] (of all the step's completions)."""
        assert self._policy is not None
        where, columns = places(batch), batch.columns
        found = scored(self._policy, batch, where, self.run.grpo.temperature)
        reference = columns["reference"][where.scored] if "reference" in columns else None
        old = columns["old"][where.scored]
        loss, figures = policy_loss(
            self._rule, found.logp, old, columns["advantage"], columns["weight"], where.counts, reference
        )
        self._note(step, figures, found.entropy)
        nothing = loss.new_zeros(())
        weight = mtp_weight(self.run, step)
        mtp = self._mtp(model, batch, where, found.hidden, weight) if weight and len(model.mtp) else nothing
        return Losses(loss, loss.detach(), mtp, nothing, found.routes, None)

    def _mtp(self, model: Transformer, batch: Batch, where: Places, hidden: Tensor, weight: float) -> Tensor:
        """The MTP modules learn to draft what the policy says; nothing else gets a gradient of it."""
        width, total = where.real.shape[1], float(batch.columns["tokens"][0])
        state = hidden.new_zeros(*where.real.shape, hidden.shape[-1])
        state[where.real] = hidden
        ahead, losses = batch.tokens[:, 1:], []
        states, _ = model.predict_ahead(state, ahead)
        for depth, one in enumerate(states, start=1):
            known = where.scored.clone()
            known[:, : width - depth] &= where.real[:, depth:]  # the token that many further on is there
            known[:, width - depth :] = False
            if bool(known.any()):
                mean = next_token_loss(one[known], model.head_weight, ahead[:, depth : depth + width][known])
                losses.append(mean * (int(known.sum()) / total / len(states)))
        if not losses:
            return hidden.new_zeros((), dtype=torch.float32)
        found, own = torch.stack(losses).sum(), list(model.mtp.parameters())
        for parameter, gradient in zip(own, torch.autograd.grad(weight * found, own, allow_unused=True), strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return found.detach()

    def _note(self, step: int, figures: Figures, entropy: Tensor) -> None:
        largest = figures.ratio_max
        added = torch.stack((*figures._replace(ratio_max=torch.zeros_like(largest)), entropy.sum().double())).cpu()
        if step != self._step:
            self._step, self._sums, self._largest = step, torch.zeros_like(added), 0.0
            self._scored = 0
        self._sums += added
        self._largest, self._scored = max(self._largest, float(largest)), self._scored + len(entropy)

    def figures(self) -> dict[str, float]:
        """Means over the tokens that the step trained on; of the entropy, over all completions' tokens.

        mismatch: the share of tokens whose log-probability is not, bit for bit, what the sampler drew them with: 0 in
        the first step on a rollout.
        """
        if self._step < 0:
            return {}
        tokens, ratio, _, clipped, kl, mismatch, entropy = self._sums.tolist()
        tokens = max(1.0, tokens)
        found = {
            "entropy": entropy / max(1, self._scored),
            "ratio_mean": ratio / tokens if ratio else 1.0,
            "ratio_max": self._largest or 1.0,
            "clipped": clipped / tokens,
            "mismatch": mismatch / tokens,
        }
        return found | {"kl": kl / tokens}
