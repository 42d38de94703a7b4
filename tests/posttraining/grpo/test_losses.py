"""The arithmetic of GRPO: what can be enumerated or done by hand, and TRL's losses on recorded rollouts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from leanseek.posttraining.losses import (
    LOSSES,
    Rule,
    advantages,
    kl_terms,
    overlong_penalty,
    policy_loss,
    spread,
    token_weights,
)

NAN = math.nan


# ---- rewards ----


def test_an_abstention_leaves_the_baseline_alone() -> None:
    """Its advantage is 0, and the others' are what they are without it."""
    found = advantages(torch.tensor([[1.0, NAN, 0.0, 0.5]], dtype=torch.float64))
    assert found.tolist() == [[0.5, 0.0, -0.5, 0.0]]
    without = advantages(torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64), divide_by_std=True)
    with_it = advantages(torch.tensor([[1.0, NAN, 0.0, 0.5]], dtype=torch.float64), divide_by_std=True)
    assert with_it[0, [0, 2, 3]].tolist() == without[0].tolist()
    assert advantages(torch.full((1, 3), NAN, dtype=torch.float64)).tolist() == [[0.0] * 3]


def test_a_group_without_spread_has_exact_zeros() -> None:
    """The mean of equal numbers may be another number in floating point."""
    rewards = torch.full((3, 7), 0.1, dtype=torch.float64)
    rewards[1, 3] = 0.2
    rewards[2, 0] = NAN
    assert spread(rewards).tolist() == [False, True, False]
    for divide in (False, True):
        assert advantages(rewards, divide)[[0, 2]].count_nonzero() == 0
        assert advantages(rewards, divide)[1].count_nonzero() == 7


def test_the_soft_penalty_falls_to_the_limit() -> None:
    assert [overlong_penalty(n, 100, 20) for n in (0, 80, 90, 100)] == [0.0, 0.0, -0.5, -1.0]


# ---- KL, on a policy of three tokens ----


def _gradients(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Over all three samples, weighted by their probability: the mean gradient of an estimate in the loss, and the
    gradients of KL(policy ‖ reference) and KL(reference ‖ policy)."""
    theta = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    log_p = theta.log_softmax(0)
    estimate = (log_p.exp().detach() * kl_terms(kind, log_p, reference)).sum()
    forward = (log_p.exp() * (log_p - reference)).sum()
    reverse = (reference.exp() * (reference - log_p)).sum()
    return tuple(torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (estimate, forward, reverse))  # type: ignore[return-value]


def test_only_k2_in_the_loss_has_the_gradient_of_kl() -> None:
    for kind in ("k1", "k2", "k3"):
        mean, forward, reverse = _gradients(kind)
        expected = {"k1": torch.zeros(3, dtype=torch.float64), "k2": forward, "k3": reverse}[kind]
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
        assert (forward - reverse).abs().max() > 0.01


def test_k1_in_the_reward_has_the_gradient_of_kl() -> None:
    theta = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    log_p = theta.log_softmax(0)
    reward = -kl_terms("k1", log_p, reference).detach()
    surrogate = -(log_p.exp().detach() * reward * log_p).sum()  # REINFORCE, every sample weighted by its probability
    (found,) = torch.autograd.grad(surrogate, theta, retain_graph=True)
    (expected,) = torch.autograd.grad((log_p.exp() * (log_p - reference)).sum(), theta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_means_of_k1_and_k3_are_kl(kind: str) -> None:
    log_p, reference = (
        torch.tensor(x, dtype=torch.float64).log_softmax(0) for x in ([0.3, -1.2, 0.8], [0.2, -1.0, 0.7])
    )
    mean = float((log_p.exp() * kl_terms(kind, log_p, reference)).sum())
    assert mean == pytest.approx(float((log_p.exp() * (log_p - reference)).sum()), rel=0.1 if kind == "k2" else 1e-9)


# ---- the loss ----

LENGTHS = [5, 1, 7, 3, 2, 6]


@pytest.fixture
def recorded() -> dict[str, Tensor]:
    """Six completions, flat: log-probabilities under the policy, the sampler and the reference; advantages."""
    generator = torch.Generator().manual_seed(3)
    n = sum(LENGTHS)
    old = -torch.rand(n, generator=generator) * 3
    logp = (old + 0.3 * torch.randn(n, generator=generator)).requires_grad_()
    reference = old + 0.5 * torch.randn(n, generator=generator)
    return {"logp": logp, "old": old, "reference": reference, "advantage": torch.randn(6, generator=generator)}


def _loss(rule: Rule, recorded: dict[str, Tensor], kept: list[bool], parts: list[range]) -> tuple[Tensor, Tensor]:
    """The loss of a step that is cut into micro-batches of whole sequences, and its gradient."""
    weights, starts = token_weights(rule.loss, LENGTHS, kept, longest=10), [sum(LENGTHS[:i]) for i in range(7)]
    total = torch.zeros(())
    for part in parts:
        tokens, rows = slice(starts[part.start], starts[part.stop]), slice(part.start, part.stop)
        loss, _ = policy_loss(
            rule, recorded["logp"][tokens], recorded["old"][tokens], recorded["advantage"][rows], weights[rows],
            LENGTHS[rows], recorded["reference"][tokens],
        )  # fmt: skip
        total = total + loss
    (gradient,) = torch.autograd.grad(total, recorded["logp"])
    return total.detach(), gradient


@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_gradient_for_any_split(loss: str, recorded: dict[str, Tensor]) -> None:
    """trl#2617"""
    rule = Rule(loss, beta=0.1)
    whole, gradient = _loss(rule, recorded, [True] * 6, [range(6)])
    for parts in ([range(1), range(1, 6)], [range(i, i + 1) for i in range(6)]):
        found, split = _loss(rule, recorded, [True] * 6, parts)
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(split, gradient)


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_answers_stand_in_no_denominator(loss: str, recorded: dict[str, Tensor]) -> None:
    """trl#6369: the loss of those that are kept is what it is without the others."""
    rule, kept = Rule(loss, beta=0.1), [True, False, True, True, False, True]
    found, gradient = _loss(rule, recorded, kept, [range(6)])
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))
    inside = torch.tensor(kept)[owner]
    alone = {name: x if name == "advantage" else x[inside].detach() for name, x in recorded.items()}
    logp = alone["logp"].requires_grad_()
    lengths = [n for n, keep in zip(LENGTHS, kept, strict=True) if keep]
    expected, _ = policy_loss(
        rule, logp, alone["old"], alone["advantage"][torch.tensor(kept)],
        token_weights(loss, lengths, [True] * 4, longest=10), lengths, alone["reference"],
    )  # fmt: skip
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(gradient[inside], torch.autograd.grad(expected, logp)[0])
    assert not gradient[~inside].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_masked_answers_is_finite_with_zero_gradient(loss: str, recorded: dict[str, Tensor]) -> None:
    """trl#6369"""
    found, gradient = _loss(Rule(loss, beta=0.1), recorded, [False] * 6, [range(6)])
    assert found == 0 and not gradient.any()


def test_clipping_stops_the_gradient_on_the_side_that_gained() -> None:
    old, lengths = torch.zeros(4), [1, 1, 1, 1]
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    gain = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, figures = policy_loss(Rule("dapo"), logp, old, gain, token_weights("dapo", lengths, [True] * 4, 9), lengths)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert [bool(g) for g in gradient] == [False, True, True, False]
    assert figures.clipped == 2 and figures.mismatch == 4
    assert float(figures.ratio_max) == pytest.approx(math.exp(0.5))


def test_dapo_clips_asymmetrically() -> None:
    logp = torch.tensor([0.22, -0.24], requires_grad=True)  # ratios 1.25 and 0.79
    gain, weights = torch.tensor([1.0, -1.0]), token_weights("dapo", [1, 1], [True] * 2, 9)
    loss, figures = policy_loss(Rule("dapo", 0.2, 0.28), logp, torch.zeros(2), gain, weights, [1, 1])
    assert [bool(g) for g in torch.autograd.grad(loss, logp)[0]] == [True, False] and figures.clipped == 1
