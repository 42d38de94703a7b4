"""GRPO's loss equals TRL's, of each of its types that we have, on recorded rollouts (needs trl==1.16)."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanseek.posttraining.losses import Rule, advantages, policy_loss, token_weights

pytest.importorskip("trl", reason="pip install trl==1.16")
pytestmark = pytest.mark.peer

LENGTHS, LONGEST = [5, 1, 7, 3, 2, 6, 7, 4], 9


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """Two groups of four completions, padded: log-probabilities, rewards."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(LENGTHS), max(LENGTHS))
    old = -3 * torch.rand(shape, generator=generator)
    return {
        "old": old,
        "logp": old + 0.3 * torch.randn(shape, generator=generator),
        "reference": old + 0.4 * torch.randn(shape, generator=generator),
        "mask": (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).int(),
        "rewards": torch.rand(len(LENGTHS), generator=generator),
    }


def trl(kind: str, level: str, rule: Rule, recorded: dict[str, Tensor], gain: Tensor) -> tuple[float, Tensor]:
    """TRL's loss and its gradient by the log-probabilities."""
    from trl import GRPOTrainer

    logp = recorded["logp"].clone().requires_grad_()
    whole = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True)
    trainer: Any = SimpleNamespace(
        loss_type=kind, importance_sampling_level=level, beta=rule.beta, epsilon_low=rule.clip_low,
        epsilon_high=rule.clip_high, max_completion_length=LONGEST, top_entropy_quantile=1.0, aux_loss_enabled=False,
        off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, accelerator=whole,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 2, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 2, dtype=torch.int64),
        "completion_ids": torch.zeros_like(recorded["mask"], dtype=torch.int64),
        "completion_mask": recorded["mask"],
        "advantages": gain,
        "old_per_token_logps": recorded["old"],
        "ref_per_token_logps": recorded["reference"],
        "num_items_in_batch": recorded["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, logp)
    return float(loss.detach()), gradient


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("ours", "kind", "level"),
    [("paper", "grpo", "token"), ("dr", "dr_grpo", "token"), ("dapo", "dapo", "token"), ("gspo", "grpo", "sequence")],
)
def test_the_loss_is_trls(ours: str, kind: str, level: str, beta: float, recorded: dict[str, Tensor]) -> None:
    low, high = (0.2, 0.28) if ours == "dapo" else (3e-2, 4e-2) if ours == "gspo" else (0.2, 0.2)
    rule = Rule(ours, low, high, beta, "k3")
    gain = advantages(recorded["rewards"].view(2, 4).double(), divide_by_std=ours == "paper").flatten().float()
    expected, gradient = trl(kind, level, rule, recorded, gain)
    real = recorded["mask"].bool()
    logp = recorded["logp"][real].clone().requires_grad_()
    weights = token_weights(ours, LENGTHS, [True] * len(LENGTHS), LONGEST)
    loss, figures = policy_loss(rule, logp, recorded["old"][real], gain, weights, LENGTHS, recorded["reference"][real])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], gradient[real], rtol=1e-5, atol=1e-8)
    assert figures.clipped > 0 or ours == "gspo"


def test_advantages_are_trls(recorded: dict[str, Tensor]) -> None:
    """Divided by the group's standard deviation as TRL computes it (unbiased, plus 1e-4)."""
    rewards = recorded["rewards"].view(2, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages(rewards.double(), True).float(), expected, rtol=1e-5, atol=1e-6)
