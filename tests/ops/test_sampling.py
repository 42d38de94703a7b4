"""The native sampler chooses what the torch form chooses, and a row's token is the row's own."""

import math
from collections.abc import Callable

import pytest
import torch

from leanseek import ops
from leanseek.ops.cpu import usable_variants, use_variant

VOCAB = 3001  # no multiple of a vector


def choice_of(rows: int, temperature: float, top_k: int, top_p: float, min_p: float) -> ops.Choice:
    return ops.Choice(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        keys=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(1)),
        filtered=top_k < VOCAB or top_p < 1 or min_p > 0,
        width=VOCAB,
    )


@pytest.fixture
def logits() -> Callable[[float], torch.Tensor]:
    return lambda spread: spread * torch.randn(400, VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", usable_variants())
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0], ids=["flat", "plain", "peaked"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.0, VOCAB, 1.0, 0.0),
        (0.6, VOCAB, 0.95, 0.0),
        (1.0, VOCAB, 1.0, 0.0),
        (1.5, 40, 1.0, 0.0),
        (1.0, 200, 0.9, 0.0),
        (1.0, VOCAB, 1.0, 0.3),
    ],
)
def test_tokens_are_those_of_the_torch_form(
    variant: str, spread: float, temperature: float, top_k: int, top_p: float, min_p: float, logits: Callable
) -> None:
    """All but a draw in a thousand: where two scores, or a cut, lie within rounding of each other."""
    rows = logits(spread)
    choice = choice_of(len(rows), temperature, top_k, top_p, min_p)
    with ops.use("torch"):
        expected = ops.sample(rows, choice)
    with use_variant(variant):
        assert (ops.sample(rows, choice) != expected).sum() <= 1


@pytest.mark.parametrize("variant", usable_variants())
def test_the_cut_is_exact_among_equals(variant: str) -> None:
    """Ten equal tokens of which top_k or top_p keep four, the first; forbidden ones never come."""
    row = torch.full((2000, VOCAB), -math.inf)
    row[:, 100:110] = 1.0
    with use_variant(variant):
        for top_k, top_p in ((4, 1.0), (VOCAB, 0.35)):
            assert ops.sample(row, choice_of(2000, 0.7, top_k, top_p, 0.0)).unique().tolist() == [100, 101, 102, 103]
        assert ops.sample(row, choice_of(2000, 0.7, VOCAB, 1.0, 0.0)).unique().tolist() == list(range(100, 110))


@pytest.mark.parametrize("variant", usable_variants())
def test_a_row_alone_gives_what_it_gives_in_company(variant: str, logits: Callable) -> None:
    rows = logits(2.0)[:9]
    together = choice_of(9, 0.8, VOCAB, 0.97, 0.0)
    with use_variant(variant), ops.row_invariant():
        tokens = ops.sample(rows, together)
        for i in range(9):
            assert ops.sample(rows[i : i + 1], together.at(torch.tensor([i]), VOCAB))[0] == tokens[i]
