"""Under `ops.row_invariant()` a row's result is the same bits whatever rows share the call, and it is right."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leanseek import ops

COUNTS = (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 100)
ROWS = 130


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_rows(function: Callable[[Tensor], Tensor], close_to: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    """function(any slice of rows) is that slice of function(all rows), and near the plain form."""
    with ops.row_invariant():
        whole = function(rows)
        torch.testing.assert_close(whole, close_to(rows), rtol=2e-5, atol=2e-5)
        for count in COUNTS:
            for first in (0, 13):
                assert torch.equal(function(rows[first : first + count]), whole[first : first + count]), count


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("inner", "outer"), [(384, 192), (1024, 384), (384, 4096), (1536, 257), (17, 33)])
def test_linear(threads: int, inner: int, outer: int) -> None:
    weight = random(outer, inner, seed=1) / inner**0.5
    check_rows(lambda x: ops.linear(x, weight), lambda x: x @ weight.T, random(ROWS, inner))


def test_linear_without_onednn(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight = random(384, 1024, seed=1) / 32
    check_rows(lambda x: ops.linear(x, weight), lambda x: x @ weight.T, random(ROWS, 1024))


def test_linear_from_fp8_blocks(threads: int) -> None:
    codes, scale = random(200, 300, seed=1).to(torch.float8_e4m3fn), random(2, 3, seed=2).abs() / 20
    weight = ops.QuantizedWeight(codes, scale, ops.FP8_BLOCKS)
    check_rows(lambda x: ops.linear(x, weight), lambda x: x @ weight.dense(torch.float32).T, random(ROWS, 300))


@pytest.mark.parametrize(("heads", "inner", "outer"), [(6, 64, 128), (16, 128, 512), (16, 512, 128), (1, 512, 64)])
def test_head_linear(threads: int, heads: int, inner: int, outer: int) -> None:
    weight = random(heads, outer, inner, seed=1).transpose(1, 2) / inner**0.5
    plain = lambda x: torch.einsum("nhk,hkr->nhr", x, weight)  # noqa: E731
    check_rows(lambda x: ops.head_linear(x, weight), plain, random(ROWS, heads, inner))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("experts", [8, 100, 256])
def test_expert_scores(threads: int, scoring: str, experts: int) -> None:
    plain = torch.sigmoid if scoring == "sigmoid" else lambda x: x.softmax(-1)
    check_rows(lambda x: ops.expert_scores(x, scoring), plain, random(ROWS, experts))


def test_swiglu(threads: int) -> None:
    plain = lambda x: torch.nn.functional.silu(x[:, :17]) * x[:, 17:]  # noqa: E731
    check_rows(lambda x: ops.swiglu(x[:, :17].contiguous(), x[:, 17:].contiguous()), plain, 8 * random(ROWS, 34))


def test_rms_norm(threads: int) -> None:
    weight = random(100, seed=1)
    plain = lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight  # noqa: E731
    check_rows(lambda x: ops.rms_norm(x, weight, 1e-6), plain, random(ROWS, 100))


def test_experts(threads: int) -> None:
    count, width, size = 12, 96, 40
    gate_up, down = random(count, 2 * size, width, seed=1) / 10, random(count, width, size, seed=2) / 6
    indices = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i))[:3] for i in range(ROWS)])
    weights = random(ROWS, 3, seed=3).abs()
    x = random(ROWS, width)
    with ops.row_invariant():
        whole = ops.experts(x, indices, weights, gate_up, down)
    with ops.use("torch"):
        torch.testing.assert_close(whole, ops.experts(x, indices, weights, gate_up, down), rtol=2e-5, atol=2e-5)
    with ops.row_invariant():
        for rows in (slice(n, n + count) for count in COUNTS for n in (0, 7)):
            part = ops.experts(x[rows], indices[rows], weights[rows], gate_up, down)
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("heads", [4, 32])
def test_latent_attention_does_not_depend_on_chunks_or_company(threads: int, heads: int) -> None:
    """Rows of a sequence attend alike in one call, cut in any chunks, and beside other sequences."""
    length, other, width, page = 300, 150, 48, 16
    cache = random(40 * page, width, seed=1)
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    mine, others = pages[:19], torch.nn.functional.pad(pages[19:29], (0, 9))
    q, q_other = random(length, heads, width, seed=3), random(other, heads, width, seed=4)

    def attend(parts: list[tuple[Tensor, Tensor, int, int]]) -> Tensor:
        """Each part: queries of a sequence, its pages, and its first and last new position."""
        counts = torch.tensor([0] + [last - first for _, _, first, last in parts])
        index = ops.CacheIndex(
            positions=torch.cat([torch.arange(first, last) for _, _, first, last in parts]),
            slots=torch.zeros(int(counts.sum()), dtype=torch.long),
            row_offsets=counts.cumsum(0),
            lengths=torch.tensor([last for *_, last in parts]),
            pages=torch.stack([own for _, own, _, _ in parts]),
            page_size=page,
        )
        queries = torch.cat([queries[first:last] for queries, _, first, last in parts])
        return ops.latent_attention(queries, cache, index, 0.2, 32)

    with ops.use("torch"):
        plain = attend([(q, mine, 0, length)])
    with ops.row_invariant():
        whole = attend([(q, mine, 0, length)])
        torch.testing.assert_close(whole, plain, rtol=2e-5, atol=2e-5)
        for cuts in ([0, 1, 2, 130, length], [0, 128, 256, length], [0, 299, length]):
            parts = [attend([(q, mine, first, last)]) for first, last in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat(parts), whole)
        for first in (0, 100, 299):
            beside = attend([(q_other, others, 0, 7), (q, mine, first, length), (q_other, others, 149, 150)])
            assert torch.equal(beside[7:-1], whole[first:])
