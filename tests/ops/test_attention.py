"""Causal attention, and absorbed attention over a paged cache, against a softmax written out per query and head."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leanseek import ops


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [T, H, dk], k and v [T, Hkv, ...]: one query of one head at a time, in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape[0], q.shape[1], v.shape[-1], dtype=torch.float64)
    for t, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        weights = torch.softmax(k[: t + 1, h // shared] @ q[t, h] * scale, 0)
        out[t, h] = weights @ v[: t + 1, h // shared]
    return out.to(torch.float32)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize(("key", "value"), [(24, 16), (16, 16), (8, 20)])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_causal_attention(heads: int, kv_heads: int, key: int, value: int, length: int, form: str) -> None:
    """MHA, GQA, MQA; values narrower and wider than keys."""
    q = torch.randn(2, length, heads, key)
    k, v = (torch.randn(2, length, kv_heads, width) for width in (key, value))
    out = ops.causal_attention(q, k, v, 0.3)
    for row in range(2):
        torch.testing.assert_close(out[row], naive(q[row], k[row], v[row], 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("key", "value"), [(24, 16), (8, 20)])
def test_causal_attention_gradients(key: int, value: int, backend: str) -> None:
    leaves = [torch.randn(2, 9, 3, width, requires_grad=True) for width in (key, key, value)]
    out = ops.causal_attention(*leaves, 0.3)
    probe = torch.randn_like(out)
    scores = torch.einsum("bthd,blhd->bhtl", leaves[0], leaves[1]) * 0.3
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
    expected = torch.einsum("bhtl,blhd->bthd", scores.softmax(-1), leaves[2])
    ours = torch.autograd.grad((out * probe).sum(), leaves)
    for mine, theirs in zip(ours, torch.autograd.grad((expected * probe).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_causal_attention_never_looks_ahead(form: str) -> None:
    """Later keys and values, however large, change nothing before them."""
    q, k, v = (torch.randn(1, 6, 2, width) for width in (12, 12, 5))
    before = ops.causal_attention(q, k, v, 0.3)
    k[:, 4:], v[:, 4:] = 900.0, 900.0
    assert torch.equal(before[:, :4], ops.causal_attention(q, k, v, 0.3)[:, :4])


WIDTH, VALUE, HEADS = 24, 16, 3


Step = tuple[Tensor, Tensor, ops.CacheIndex, list[Tensor]]


def paged(lengths: list[int], new: list[int], page_size: int, seed: int) -> Step:
    """Queries of each sequence's last new[s] tokens, a cache with pages in any order, its index, and the plain rows."""
    generator = torch.Generator().manual_seed(seed)
    pages = max(-(-length // page_size) for length in lengths)
    used = pages * len(lengths)
    order = torch.randperm(used + 2, generator=generator)[:used].view(len(lengths), pages)
    cache = torch.full(((used + 2) * page_size, WIDTH), 1e4)  # stale rows would be loud
    rows, slots, positions = [], [], []
    for s, length in enumerate(lengths):
        at = torch.arange(length)
        slot = order[s, at // page_size] * page_size + at % page_size
        cache[slot] = torch.randn(length, WIDTH, generator=generator)
        rows.append(cache[slot])
        slots.append(slot[length - new[s] :])
        positions.append(at[length - new[s] :])
    offsets = torch.tensor([0, *itertools.accumulate(new)])
    index = ops.CacheIndex(torch.cat(positions), torch.cat(slots), offsets, torch.tensor(lengths), order, page_size)
    return torch.randn(sum(new), HEADS, WIDTH, generator=generator), cache, index, rows


def naive_latent(q: Tensor, rows: list[Tensor], index: ops.CacheIndex, scale: float) -> Tensor:
    out, owner = [], 0
    for n in range(q.shape[0]):
        while n >= index.row_offsets[owner + 1]:
            owner += 1
        visible = rows[owner][: int(index.positions[n]) + 1].double()
        weights = torch.softmax(q[n].double() @ visible.T * scale, -1)
        out.append(weights @ visible[:, :VALUE])
    return torch.stack(out).float()


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ([1], [1]),
        ([9], [9]),
        ([9], [1]),
        ([13, 4, 1, 8], [1, 1, 1, 1]),
        ([13, 4, 5, 8], [6, 4, 1, 3]),
        ([5, 7], [0, 2]),
    ],
)
def test_latent_attention(lengths: list[int], new: list[int], page_size: int, form: str) -> None:
    """Prefill, decode, mixed steps, a sequence with nothing new; pages in any order, full and half full."""
    q, cache, index, rows = paged(lengths, new, page_size, seed=0)
    out = ops.latent_attention(q, cache, index, 0.2, VALUE)
    assert out.shape == (sum(new), HEADS, VALUE)
    torch.testing.assert_close(out, naive_latent(q, rows, index, 0.2), rtol=1e-5, atol=1e-5)


@given(st.data())
def test_latent_attention_of_any_step(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    new = [data.draw(st.integers(1, length)) for length in lengths]
    q, cache, index, rows = paged(lengths, new, data.draw(st.integers(1, 9)), data.draw(st.integers(0, 2**31)))
    for scope in (ops.use("torch"), ops.use("native"), ops.row_invariant()):
        with scope:
            out = ops.latent_attention(q, cache, index, 0.2, VALUE)
        torch.testing.assert_close(out, naive_latent(q, rows, index, 0.2), rtol=1e-5, atol=1e-5)


def test_bf16_cache_under_float32_queries(form: str) -> None:
    """A cache narrower than the activations is read as it is."""
    q, cache, index, rows = paged([13, 4], [2, 4], 4, seed=1)
    narrow = ops.latent_attention(q, cache.bfloat16(), index, 0.2, VALUE)
    assert narrow.dtype == torch.float32
    expected = naive_latent(q, [row.bfloat16().float() for row in rows], index, 0.2)
    torch.testing.assert_close(narrow, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_sequence() -> None:
    """Cache rows in the order of the sequence, only as many as it has."""
    pages = torch.tensor([[3, 0, 2], [1, 4, 5]])
    index = ops.CacheIndex(*[torch.zeros(0, dtype=torch.int64)] * 3, torch.tensor([7, 3]), pages, 3)
    assert index.rows_of(0).tolist() == [9, 10, 11, 0, 1, 2, 6]
    assert index.rows_of(1).tolist() == [3, 4, 5]
