"""Several samples in a row: each is computed as if it were alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leanseek import Transformer, fp8, ops
from leanseek.model import Lengths, Shared, membership, sample_balance_loss, sequence_balance_loss, without_padding
from leanseek.model.packing import positions, within
from leanseek.training.objective import losses

LENGTHS: Lengths = ((7, 1, 6), (5, 8))  # of rows of 15: padding of 1 and 2
SIZE = 15
KINDS = [{}, {"num_nextn_predict_layers": 2, "tie_word_embeddings": True}, {"attention": "gqa", "head_dim": 8}]
Build = Callable[..., Transformer]


def packed(ahead: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens [2, SIZE + ahead] and which of them count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 96, (2, SIZE + ahead), generator=generator)
    return tokens, (torch.rand(tokens.shape, generator=generator) < 0.6).float() / 10


def samples() -> list[tuple[int, int, int]]:
    """Row, start and stop of each sample."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            found.append((row, start, start := start + length))
    return found


def alone(tokens: Tensor, weights: Tensor, ahead: int) -> list[tuple[Tensor, Tensor]]:
    """Each sample in a row of its own, with `ahead` tokens after it that do not count."""
    pad = torch.nn.functional.pad
    return [
        (pad(tokens[r : r + 1, a:b], (0, ahead)), pad(weights[r : r + 1, a:b], (0, ahead))) for r, a, b in samples()
    ]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_packed_is_unpacked(tiny_model: Build, changes: dict, recompute: bool) -> None:
    """Loss and gradients, MTP's too. A sample's first token is no target, nor is one across its end."""
    model = tiny_model(**changes)
    ahead = model.config.lookahead
    tokens, weights = packed(ahead)
    found = losses(
        model, tokens, weights=weights, lengths=LENGTHS, mtp_weight=0.3, sequence_alpha=0.0, recompute=recompute
    )
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    each = [losses(model, t, weights=w, mtp_weight=0.3, recompute=recompute) for t, w in alone(tokens, weights, ahead)]
    for one in each:
        if one.total.requires_grad:
            one.backward()
    for name in ("main", "mtp", "total"):
        torch.testing.assert_close(getattr(found, name), sum(getattr(one, name) for one in each), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda t, n=name: f"{n} {t}"
        )


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_packed_is_unpacked_bit_for_bit_row_by_row(tiny_model: Build, changes: dict) -> None:
    """Where a row's result does not depend on the rows beside it."""
    model = tiny_model(**changes)
    tokens, weights = packed(model.config.lookahead)
    with torch.no_grad(), ops.row_invariant():
        hidden, _ = model.hidden(tokens[:, :SIZE], lengths=LENGTHS)
        states, _ = model.predict_ahead(hidden, tokens[:, 1:], lengths=LENGTHS)
        for (row, a, b), (own, _) in zip(samples(), alone(tokens, weights, model.config.lookahead), strict=True):
            expected, _ = model.hidden(own[:, : b - a])
            assert torch.equal(hidden[row, a:b], expected[0])
            after, _ = model.predict_ahead(expected, own[:, 1:])
            for depth, (state, other) in enumerate(zip(states, after, strict=True), start=1):
                assert torch.equal(state[row, a : max(a, b - depth)], other[0, : max(0, b - a - depth)])


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_samples_do_not_see_each_other_trl_1230(tiny_model: Build, changes: dict) -> None:
    """Another neighbour changes no bit of a sample, and a sample's loss has no gradient in its neighbours."""
    model = tiny_model(**changes)
    tokens, _ = packed(model.config.lookahead)
    other, _ = packed(model.config.lookahead, seed=2)
    row, a, b = samples()[2]
    other[row, a:b] = tokens[row, a:b]
    with torch.no_grad(), ops.row_invariant():
        found = []
        for ids in (tokens, other):
            hidden, _ = model.hidden(ids[:, :SIZE], lengths=LENGTHS)
            states, _ = model.predict_ahead(hidden, ids[:, 1:], lengths=LENGTHS)
            found.append([state[row, a:b] for state in (hidden, *states)])
        assert all(map(torch.equal, *found))
    ids = torch.arange(2 * (SIZE + model.config.lookahead)).view(2, -1)  # each once
    weights = torch.zeros(ids.shape)
    weights[row, a + 1 : b] = 1.0
    seen: list[Tensor] = []

    def watch(module: torch.nn.Module, inputs: object, embedded: Tensor) -> None:
        embedded.retain_grad()
        seen.append(embedded)

    with model.embed_tokens.register_forward_hook(watch):
        losses(model, ids, weights=weights, lengths=LENGTHS, mtp_weight=0.3).backward()
    assert len(seen) == 1 + model.config.num_nextn_predict_layers
    for embedded in seen:
        reached = embedded.grad.abs().sum(-1) > 0
        assert reached[row, a : b - 1].any()
        reached[row, a:b] = False
        assert not reached.any()


def test_positions_and_ends() -> None:
    assert positions(LENGTHS, torch.zeros(2, SIZE)).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2, 3, 4, 5, 0],
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0],
    ]
    assert within(LENGTHS, torch.ones(2, SIZE, dtype=torch.int64), 2).tolist() == [
        [1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    ]
    assert positions(None, torch.zeros(2, 3)).tolist() == [[0, 1, 2]]


def test_padding_is_not_counted_and_balance_is_by_sample(tiny_model: Build) -> None:
    """The sequence-wise loss of packed samples is the one of each alone, weighted by its length."""
    model = tiny_model()
    tokens, weights = packed(1)
    with torch.no_grad():
        _, routes = model.hidden(tokens[:, :SIZE], lengths=LENGTHS)
        kept = without_padding(routes, LENGTHS)
        assert [r.indices.shape[0] for r in kept] == [27] * len(routes)
        members = membership(LENGTHS, torch.device("cpu"))
        assert members.sum(1).tolist() == [7, 1, 6, 5, 8]
        expected = torch.zeros(len(routes))
        for own, _ in alone(tokens, weights, 0):
            _, each = model.hidden(own)
            expected += torch.stack([sequence_balance_loss(r, 1, 3) * own.shape[1] for r in each])
        found = torch.stack([sample_balance_loss(r, members, 3) for r in kept])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        total = losses(model, tokens, weights=weights, lengths=LENGTHS, sequence_alpha=0.5, share=0.25)
        torch.testing.assert_close(total.balance, 0.25 * 0.5 * expected.sum() / 30, rtol=1e-5, atol=0)
        assert [r.indices.shape[0] for r in total.routes] == [27] * len(routes)


def test_fp8_packed_is_unpacked(tiny_model: Build) -> None:
    """Attention's inputs are computed again once for all samples, and its output is rounded by sample."""
    model = tiny_model()
    fp8.apply(model, "fp8")
    tokens, weights = packed(1)
    found = losses(model, tokens, weights=weights, lengths=LENGTHS)
    found.backward()
    gradient = model.layers[1].self_attn.q_b_proj.weight.grad.clone()
    model.zero_grad()
    each = [losses(model, t, weights=w) for t, w in alone(tokens, weights, 1)]
    for one in each:
        if one.total.requires_grad:
            one.backward()
    torch.testing.assert_close(found.main, sum(one.main for one in each), rtol=1e-2, atol=0)
    other = model.layers[1].self_attn.q_b_proj.weight.grad
    assert (gradient - other).norm() < 0.1 * other.norm()


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_shared_rows_are_what_each_sample_alone_has(tiny_model: Build, changes: dict) -> None:
    """A row that several samples begin with is computed once; its gradient is the sum of theirs."""
    model = tiny_model(**changes)
    rows_of = [[0, 1, 2, 3], [0, 1, 4], [0, 1, 2, 5, 6], [7], [0, 1, 2, 3]]
    shared, block = Shared.of(rows_of, torch.device("cpu")), model.layers[1]
    cos, sin = model.rotary(torch.arange(5)[None])
    at = torch.tensor([0, 1, 2, 3, 2, 3, 4, 0])
    x = torch.randn(8, model.config.hidden_size, requires_grad=True)
    out = block(x[None], cos[:, at], sin[:, at], False, None, shared)[0][0]
    alone = [block(x[rows][None], cos[:, : len(rows)], sin[:, : len(rows)])[0][0] for rows in rows_of]
    for rows, expected in zip(rows_of, alone, strict=True):
        torch.testing.assert_close(out[rows], expected)
    shares = [torch.randn_like(each) for each in alone]
    leaves = [x, *block.parameters()]
    expected = torch.autograd.grad(sum((a * s).sum() for a, s in zip(alone, shares, strict=True)), leaves)
    loss = sum((out[rows] * s).sum() for rows, s in zip(rows_of, shares, strict=True))
    for found, gradient in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4)
