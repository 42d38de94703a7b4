"""The native sampler chooses what the torch form chooses, and a row's token is the row's own."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch

from leanseek import ops
from leanseek.native import usable_variants, use_variant

VOCAB = 3001  # no multiple of a vector


def choice_of(rows: int, temperature: float, top_k: int, top_p: float, min_p: float) -> ops.Choice:
    return ops.Choice(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        keys=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(1)),
    )


@functools.cache
def logits(spread: float) -> torch.Tensor:
    return spread * torch.randn(400, VOCAB, generator=torch.Generator().manual_seed(0))


@functools.cache
def of_torch(spread: float, *choice: float) -> torch.Tensor:
    """The tokens that the torch form draws, once for all variants: it takes long."""
    rows = logits(spread)
    with ops.use("torch"):
        return ops.sample(rows, choice_of(len(rows), *choice))


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
    variant: str, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """All but a draw in a thousand: where two scores, or a cut, lie within rounding of each other."""
    rows = logits(spread)
    choice = choice_of(len(rows), temperature, top_k, top_p, min_p)
    expected = of_torch(spread, temperature, top_k, top_p, min_p)
    with use_variant(variant):
        assert (ops.sample(rows, choice) != expected).sum() <= 1


@pytest.fixture(params=["torch", *usable_variants(), pytest.param("cuda", marks=pytest.mark.gpu)])
def path(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each way to a token: torch, every native library, torch on a GPU. The device that the rows lie on."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    with ops.use("torch") if request.param == "torch" else use_variant(request.param):
        yield torch.device("cpu")


def on(device: torch.device, choice: ops.Choice) -> ops.Choice:
    return ops.Choice(**{field.name: getattr(choice, field.name).to(device) for field in fields(choice)})


def test_the_cut_is_exact_among_equals(path: torch.device) -> None:
    """Ten equal tokens of which top_k or top_p keep four, the first; forbidden ones never come."""
    row = torch.full((300, VOCAB), -math.inf)
    row[:, 100:110] = 1.0
    for top_k, top_p in ((4, 1.0), (VOCAB, 0.35), (8, 0.5)):
        tokens = ops.sample(row.to(path), on(path, choice_of(300, 0.7, top_k, top_p, 0.0)))
        assert tokens.unique().tolist() == [100, 101, 102, 103]
    tokens = ops.sample(row.to(path), on(path, choice_of(300, 0.7, VOCAB, 1.0, 0.0)))
    assert tokens.unique().tolist() == list(range(100, 110))


def test_top_p_is_a_share_of_what_top_k_leaves(path: torch.device) -> None:
    """Of 1,200 equal tokens 600, and half of those: further down than a first look goes."""
    tokens = ops.sample(torch.zeros(1500, 1200, device=path), on(path, choice_of(1500, 1.0, 600, 0.5, 0.0)))
    assert tokens.max() == 299 and len(tokens.unique()) > 280


@pytest.mark.parametrize("rounded", [False, True], ids=["plain", "many equals"])
def test_a_row_s_token_is_the_row_s_own(path: torch.device, rounded: bool) -> None:
    """Every kind of request alone, and in crowds of several sizes, orders and neighbours: the same token."""
    kinds = [
        *itertools.product((0.0,), (VOCAB,), (1.0,), (0.0,)),
        *itertools.product((0.7, 2.5), (VOCAB, 1, 40, 64, 1000), (1.0, 0.9, 0.1), (0.0, 0.02)),
    ]
    count = len(kinds)
    rows = logits(1.0)[:count].to(torch.bfloat16 if rounded else torch.float32).float()
    values = torch.tensor(kinds, dtype=torch.float64).unbind(1)
    keys = choice_of(count, 1.0, VOCAB, 1.0, 0.0).keys
    all_rows = on(path, ops.Choice(values[0].float(), values[1].long(), values[2].float(), values[3].float(), keys))
    rows = rows.to(path)
    with ops.row_invariant():
        alone = torch.cat([ops.sample(rows[i : i + 1], all_rows.at(slice(i, i + 1))) for i in range(count)])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
        for size in (2, 3, 17, count):
            for crowd in (*order.to(path).split(size), torch.arange(count, device=path)[-size:]):
                assert torch.equal(ops.sample(rows[crowd], all_rows.at(crowd)), alone[crowd]), size
    assert len(alone.unique()) > count // 2  # tokens that nothing but chance decides
