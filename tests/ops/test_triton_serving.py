"""A served step's Triton kernels against the torch references, and a row's bits in any company: on a GPU as compiled,
elsewhere by Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leanseek import ops

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanseek.gpu.device.refusal", lambda device: "")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def blocks(*shape: int, seed: int = 0) -> ops.QuantizedWeight:
    """Codes of every value but NaN."""
    *stack, rows, columns = shape
    bits = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    bits[(bits & 127) == 127] = 0
    scales = draw(*stack, -(-rows // 128), -(-columns // 128), seed=seed + 1).abs() * 0.01
    return ops.QuantizedWeight(bits.to(DEVICE).view(torch.float8_e4m3fn), scales, ops.FP8_BLOCKS)


def served(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    with ops.use("gpu"), ops.row_invariant(), torch.inference_mode():
        return function(*inputs)


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    step = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), expected.float(), rtol=step, atol=step * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_linear(rows: int, dtype: torch.dtype) -> None:
    x, weight = draw(rows, 200, dtype=dtype), draw(70, 200, seed=1, dtype=dtype)
    agree(served(ops.linear, x, weight), x.float() @ weight.float().t(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_fp8_blocks(dtype: torch.dtype) -> None:
    """Rows and columns that 128 does not divide."""
    x, weight = draw(5, 200, dtype=dtype), blocks(150, 200)
    agree(served(ops.linear, x, weight), x.float() @ weight.dense(torch.float32).t(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_linear_of_turned_weights(dtype: torch.dtype) -> None:
    x, weight = draw(4, 3, 24, dtype=dtype), draw(3, 40, 24, seed=1, dtype=dtype)
    expected = torch.einsum("nhk,hrk->nhr", x.float(), weight.float())
    agree(served(ops.head_linear, x, weight.transpose(1, 2)), expected, dtype)


def routed(tokens: int, n_experts: int, k: int) -> tuple[Tensor, Tensor]:
    indices = draw(tokens, n_experts, seed=7).topk(k, dim=-1).indices
    return indices, draw(tokens, k, seed=8).sigmoid()


def by_hand(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for e, w in zip(indices[n].tolist(), weights[n], strict=True):
            gate, up = (gate_up[e] @ x[n]).chunk(2)
            out[n] += w * (down[e] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts(tokens: int, dtype: torch.dtype) -> None:
    x, gate_up, down = draw(tokens, 40), draw(6, 2 * 24, 40, seed=1) * 0.2, draw(6, 40, 24, seed=2) * 0.2
    indices, weights = routed(tokens, 6, 2)
    stored = [t.to(dtype) for t in (x, gate_up, down)]
    expected = by_hand(stored[0].float(), indices, weights, stored[1].float(), stored[2].float())
    agree(served(ops.experts, stored[0], indices, weights, *stored[1:]), expected, dtype)


def test_experts_of_fp8_blocks() -> None:
    x, gate_up, down = draw(9, 128), blocks(4, 256, 128), blocks(4, 128, 128, seed=5)
    indices, weights = routed(9, 4, 2)
    expected = by_hand(x, indices, weights, gate_up.dense(torch.float32), down.dense(torch.float32))
    agree(served(ops.experts, x, indices, weights, gate_up, down), expected, torch.float32)


def paged(lengths: list[int], new: list[int], page: int, width: int) -> tuple[Tensor, ops.CacheIndex]:
    """A cache of random rows, its pages in no order; each sequence has `new` tokens at its end."""
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(3))
    pages = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    for s, count in enumerate(counts):
        pages[s, :count] = order[sum(counts[:s]) : sum(counts[:s]) + count]
    positions = torch.cat([torch.arange(n - k, n) for n, k in zip(lengths, new, strict=True)])
    offsets = torch.tensor([0, *new]).cumsum(0)
    cache = draw((sum(counts) + 1) * page, width, seed=4)
    index = ops.CacheIndex(positions, torch.zeros_like(positions), offsets, torch.tensor(lengths), pages, page)
    return cache, ops.CacheIndex(*(t.to(DEVICE) if isinstance(t, Tensor) else t for t in index))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [3, 17])
def test_latent_attention(heads: int, dtype: torch.dtype) -> None:
    """Over chunks of keys, pages in no order, a width that is no power of two; prefill beside decode."""
    cache, index = paged([1, 270, 9], [1, 1, 2], 16, 40)
    cache, q = cache.to(dtype), draw(4, heads, 40, dtype=dtype)
    with ops.use("torch"):
        expected = ops.latent_attention(q.float(), cache.float(), index, 0.3, 24)
    agree(served(ops.latent_attention, q, cache, index, 0.3, 24), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    x, weight = draw(70, 96, dtype=dtype), draw(60, 96, seed=1, dtype=dtype)
    gate_up, down = draw(6, 2 * 24, 96, seed=1, dtype=dtype), draw(6, 96, 24, seed=2, dtype=dtype)
    indices, weights = routed(70, 6, 2)
    heads = x.unflatten(1, (4, 24))
    turned = draw(4, 24, 30, seed=5, dtype=dtype)
    norm = draw(96, seed=9).to(dtype)
    whole = [
        served(ops.linear, x, weight), served(ops.head_linear, heads, turned),
        served(ops.experts, x, indices, weights, gate_up, down), served(ops.rms_norm, x, norm, 1e-6),
    ]  # fmt: skip
    for rows in (slice(0, 1), slice(62, 66)):
        parts = [
            served(ops.linear, x[rows], weight), served(ops.head_linear, heads[rows], turned),
            served(ops.experts, x[rows], indices[rows], weights[rows], gate_up, down),
            served(ops.rms_norm, x[rows], norm, 1e-6),
        ]  # fmt: skip
        assert all(torch.equal(part, all_[rows]) for part, all_ in zip(parts, whole, strict=True))


def test_attention_has_the_same_bits_in_any_company() -> None:
    cache, index = paged([40, 270], [2, 1], 16, 40)
    q = draw(3, 4, 40)
    together = served(ops.latent_attention, q, cache, index, 0.3, 24)
    for sequence, rows in ((0, slice(0, 2)), (1, slice(2, 3))):
        pages = index.pages[sequence : sequence + 1]
        used = pages[:, : -(-int(index.lengths[sequence]) // 16)]
        for table in (pages, used):  # with and without room for more keys
            count = torch.tensor([0, rows.stop - rows.start], device=DEVICE)
            alone = ops.CacheIndex(
                index.positions[rows], index.slots[rows], count, index.lengths[sequence : sequence + 1], table, 16
            )
            assert torch.equal(served(ops.latent_attention, q[rows], cache, alone, 0.3, 24), together[rows])
