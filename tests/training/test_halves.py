"""Backward in two halves: gradients of inputs first, those of weights later, and both are one backward's to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from leanseek import ModelConfig, Transformer, fp8, ops
from leanseek.training.objective import losses
from tests.small import NETWORK

MODEL = ModelConfig(
    **NETWORK | {"vocab_size": 67, "num_hidden_layers": 3, "n_routed_experts": 8, "initializer_range": 0.1}
)
TOKENS = torch.randint(0, 67, (3, 12 + 2), generator=torch.Generator().manual_seed(1))


def model(precision: str, **changes: object) -> Transformer:
    found = Transformer(dataclasses.replace(MODEL, **changes)).init_weights(5)
    fp8.apply(found, precision)
    return found


PRECISIONS = ("bf16", "fp8", "fp8-tensorwise", "fp8-gradient-blocks")
CHANGES = ({}, {"tie_word_embeddings": True, "q_lora_rank": None}, {"attention": "gqa", "head_dim": 8})
# every pair of values
CASES = [
    (precision, bool((i // 2 + j) % 2), (torch.float32, torch.bfloat16)[(i + j) % 2], changes)
    for i, precision in enumerate(PRECISIONS)
    for j, changes in enumerate(CHANGES)
]


@pytest.mark.parametrize(("precision", "recompute", "dtype", "changes"), CASES)
def test_two_halves_are_one_backward(precision: str, recompute: bool, dtype: torch.dtype, changes: dict) -> None:
    """Two micro-batches: the gradients of both add up. Nothing is left of what was put off."""
    options = {"share": 0.5, "mtp_weight": 0.3, "sequence_alpha": 0.5, "dtype": dtype, "recompute": recompute}
    whole, halves = model(precision, **changes), model(precision, **changes)
    for tokens in (TOKENS, TOKENS.flip(0)):
        losses(whole, tokens, **options).backward()
        later = ops.WeightGradients()
        with later:
            found = losses(halves, tokens, **options)
        before = {name: None if p.grad is None else p.grad.clone() for name, p in halves.named_parameters()}
        with later:
            found.backward()
        waiting = [n for n, p in halves.named_parameters() if p.grad is None or _same(p.grad, before[n])]
        assert sorted(waiting) == sorted(_put_off(halves))
        later.compute()
        later.compute()  # nothing is left
    for (name, a), b in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def _same(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    return b is not None and torch.equal(a, b)


def _put_off(network: Transformer) -> list[str]:
    """Every weight but the embedding's, the norms' and the head's."""
    kept = ("norm.weight", "embed_tokens.weight", "lm_head.weight")
    return [n for n, _ in network.named_parameters() if not n.endswith(kept)]


def test_an_input_without_gradient_and_a_frozen_weight() -> None:
    """Autograd does not ask for what nobody needs, in halves either."""
    x, weight = torch.randn(4, 3), nn.Parameter(torch.randn(5, 3))
    frozen = torch.randn(2, 5)
    with ops.WeightGradients() as later:
        ops.linear(ops.linear(x, weight), frozen).sum().backward()
    assert weight.grad is None
    later.compute()
    assert torch.allclose(weight.grad, torch.outer(frozen.sum(0), x.sum(0)), atol=1e-5)
    assert frozen.grad is None


def test_the_gradient_of_a_weight_made_from_others_comes_at_once() -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    with ops.WeightGradients() as later:
        ops.linear(torch.randn(4, 3), weight * 2).sum().backward()
    found = weight.grad.clone()
    later.compute()
    assert torch.equal(weight.grad, found)
