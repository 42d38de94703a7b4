"""Kernels over arbitrary bits: NaN, infinities, subnormals, every code. `make sanitize` sees what they touch.

What one row, request or expert holds never reaches another's result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leanseek import Transformer, native, ops
from leanseek.backends import PanelBackend
from leanseek.native import panels
from leanseek.ops import quantize as fp8
from leanseek.ops.operands import Kept
from leanseek.ops.weights import WeightFormat, named_weights
from tests.conftest import into_fp8_blocks

pytestmark = pytest.mark.skipif(not native.usable_variants(), reason=f"no kernels here: {native.status().detail}")
VARIANTS = list(native.usable_variants())
SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 88.8, -104.0]
)
STORED = [ops.FP8_BLOCKS, ops.INT8_ROWS, torch.bfloat16, torch.float32]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[None]:
    with native.use_variant(request.param):
        yield


# Whoever adds a kernel adds it to a test below, and here.
FUZZED = """adamw attention_backward attention_forward combine_rows finite_rows fp8_blocks fp8_rows
fp8_swiglu fp8_swiglu_backward fp8_turn fp8_wide grouped_gradient grouped_product latent_attention pack_panels packed_linear
quantize_rows rms_norm rms_norm_backward rotate sample_rows stack_step swiglu swiglu_backward"""
WITHOUT_NUMBERS = "read_memory sources supported"


def test_every_kernel_is_fuzzed() -> None:
    sources = (Path(native.__file__).parent / "kernels").glob("*.cpp")
    found = {
        n for s in sources for n in re.findall(r"^(?:KERNEL|EXPORTED .*?)\*? ?(\w+)\(", s.read_text("utf-8"), re.M)
    }
    assert found == {*FUZZED.split(), *WITHOUT_NUMBERS.split()}


def bits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random bits; of floats a third are plain numbers and a third are special ones."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
    values = raw.view(dtype)
    if dtype.itemsize > 1:
        kind = torch.randint(0, 3, shape, generator=generator)
        special = SPECIAL[torch.randint(0, len(SPECIAL), shape, generator=generator)].to(dtype)
        values = torch.where(
            kind == 0, special, torch.where(kind == 1, torch.randn(shape, generator=generator), values)
        )
    return values.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# ---- serving ----


def choice(rows: int, vocab: int, **given: Tensor) -> ops.Choice:
    values: dict[str, Any] = {
        "temperature": torch.ones(rows),
        "top_k": torch.full((rows,), vocab),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "keys": torch.arange(rows) * 7919,
    }
    return ops.Choice(**values | given)


@pytest.mark.parametrize("path", [*VARIANTS, "torch"])
@pytest.mark.parametrize("vocab", [1, 31, 1000])
def test_tokens_of_any_logits_and_parameters_are_in_the_vocabulary(path: str, vocab: int) -> None:
    rows = 300
    logits = bits(rows, vocab)
    logits[0], logits[1], logits[2], logits[3] = torch.nan, -torch.inf, torch.inf, 3.4e38
    wild = choice(
        rows,
        vocab,
        temperature=bits(rows, seed=1),
        top_p=bits(rows, seed=2),
        min_p=bits(rows, seed=3),
        top_k=torch.arange(rows) % (vocab + 2) - 1,
    )
    mild = choice(rows, vocab, temperature=torch.tensor([1e-6, 0.7, 100.0] * 100), top_p=torch.full((rows,), 0.9))
    with ops.use("torch") if path == "torch" else native.use_variant(path):
        for each in (mild, choice(rows, vocab, temperature=torch.zeros(rows)), *([wild] if path != "torch" else [])):
            tokens = ops.sample(logits, each)
            assert 0 <= int(tokens.min()) <= int(tokens.max()) < vocab
            assert torch.equal(ops.sample(logits, each), tokens)


@pytest.mark.usefixtures("variant")
def test_nan_and_infinite_logits_give_the_token_of_the_torch_form() -> None:
    """A NaN is never chosen beside a number; an infinite maximum is the token."""
    n, inf = torch.nan, torch.inf
    rows = torch.full((5, 45), n)
    rows[:, 13:18] = torch.tensor(
        [[n, 1, 9, n, 2], [n, n, n, n, n], [1, inf, n, inf, 2], [-inf, -inf, -inf, -inf, -inf], [n, -inf, n, 3, n]]
    )
    rows[3] = -inf
    for temperature in (0.0, 0.01):
        one = choice(5, 45, temperature=torch.full((5,), temperature))
        assert ops.sample(rows, one).tolist() == [15, 0, 14, 0, 16]
        with ops.use("torch"):
            assert ops.sample(rows, one).tolist() == [15, 0, 14, 0, 16]


@pytest.mark.parametrize("path", [*VARIANTS, "torch"])
def test_rows_that_are_not_finite_are_told(path: str) -> None:
    rows = torch.randn(40, 37)
    bad = [3, 8, 20, 39]
    for row, place, value in zip(bad, (0, 36, 17, 35), (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
        rows[row, place] = value
    rows[5, 5], rows[6] = 3.4e38, -3.4e38
    with ops.use("torch") if path == "torch" else native.use_variant(path):
        assert (~ops.finite_rows(rows)).nonzero().flatten().tolist() == bad
        assert ops.finite_rows(rows[:, 1:36])[[3, 39]].tolist() == [True, False]


def stored_bits(form: torch.dtype | WeightFormat, *shape: int, seed: int = 0) -> ops.StoredWeight:
    if isinstance(form, torch.dtype):
        return bits(*shape, dtype=form, seed=seed)
    scale = bits(*form.scale_shape(shape), seed=seed + 1)
    return ops.QuantizedWeight(bits(*shape, dtype=form.dtype, seed=seed), scale, form)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_products_of_any_bits(stored: torch.dtype | WeightFormat, x_dtype: torch.dtype) -> None:
    """A row gives alone, beside rows that are no numbers, what it gives among numbers."""
    weight = panels.pack(stored_bits(stored, 150, 261))
    x = torch.randn(45, 261).to(x_dtype)
    mixed = x.clone()
    mixed[1::2] = bits(22, 261, dtype=x_dtype, seed=4)
    for m in (1, 2, 5, 9, 45):
        assert same(panels.linear(mixed[:m], weight)[::2], panels.linear(x[:m], weight)[::2])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("stored", [*STORED[:1], *STORED[2:]])
@torch.no_grad()
def test_experts_of_any_bits(tiny_model: Callable[..., Transformer], stored: torch.dtype | WeightFormat) -> None:
    """A NaN in one expert stays with the tokens that chose it."""
    alike = {"n_group": 1, "topk_group": 1, "hidden_size": 128, "moe_intermediate_size": 128}
    model = tiny_model(num_hidden_layers=1, first_k_dense_replace=0, **alike)
    experts, tokens = model.layers[0].mlp.experts, torch.arange(30)
    chosen = torch.cat([model.hidden(token.view(1, 1))[1][0].indices for token in tokens])
    untouched = (chosen != 2).all(-1)
    if not isinstance(stored, torch.dtype):
        into_fp8_blocks(model, "layers.0.mlp.experts")
    else:
        experts.to(stored)

    def run() -> Tensor:
        backend = PanelBackend(model.config, named_weights(model))
        at = torch.zeros(30, dtype=torch.int64)  # 30 sequences of one token
        index = ops.CacheIndex(at, 4 * torch.arange(30), torch.arange(31), at + 1, torch.arange(30)[:, None], 4)
        return backend.step(tokens, torch.zeros(1, 120, model.config.cache_width), index)

    before = run()
    for weight in (experts.gate_up_proj, experts.down_proj):
        weight.data[2] = bits(*weight.shape[1:], dtype=weight.data.dtype)
    after = run()
    assert same(after[untouched], before[untouched])
    assert untouched.any() and not same(after, before)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width", "value"), [(3, 12, 8), (20, 576, 512)])
@torch.no_grad()
def test_attention_over_any_bits(dtype: torch.dtype, heads: int, width: int, value: int) -> None:
    """Pages that another request left full of NaN are not read; a sequence of NaN is its own affair."""
    lengths, page = torch.tensor([1, 40, 300]), 16
    pages = torch.randperm(60).view(3, 20)
    index = ops.CacheIndex(lengths - 1, lengths - 1, torch.arange(4), lengths, pages, page)
    q = torch.randn(3, heads, width).to(dtype)
    cache = torch.full((60 * page, width), torch.nan, dtype=dtype)
    for s in (0, 1, 2):
        rows = index.rows_of(s)
        cache[rows] = torch.randn(len(rows), width).to(dtype)
    clean = ops.latent_attention(q, cache, index, 0.1, value)
    assert clean.isfinite().all()
    cache[index.rows_of(1)] = bits(40, width, dtype=dtype)
    mixed = ops.latent_attention(q, cache, index, 0.1, value)
    assert torch.equal(mixed[[0, 2]], clean[[0, 2]])
    with ops.use("torch"), ops.row_invariant():
        assert ops.latent_attention(q, cache, index, 0.1, value)[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "gate", [{}, {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1}]
)
@torch.no_grad()
def test_a_whole_step_over_any_bits(tiny_model: Callable[..., Transformer], dtype: torch.dtype, gate: dict) -> None:
    """Gate, norms, rotation and cache too: the largest of NaN is an expert that there is."""
    for seed in range(3):
        model = tiny_model(num_nextn_predict_layers=1, **gate)
        for i, tensor in enumerate((*model.parameters(), *model.buffers())):
            if tensor.is_floating_point() and tensor.ndim and (seed or i % 3 == 0):
                tensor.copy_(bits(*tensor.shape, seed=seed + i))
        model = model.to(dtype).requires_grad_(False)
        backend = PanelBackend(model.config, named_weights(model))
        n, c = 9, model.config
        cache = bits(c.num_hidden_layers + 1, 16, c.cache_width, dtype=dtype)
        at = torch.arange(n)
        index = ops.CacheIndex(at, at, torch.tensor([0, n]), torch.tensor([n]), torch.arange(4)[None], 4)
        hidden = backend.step(at, cache, index)
        backend.step_ahead(1, hidden, at, cache, index)
        assert backend.logits(hidden).shape == (n, c.vocab_size)


@pytest.mark.parametrize("path", [*VARIANTS, "torch"])
@torch.no_grad()
def test_heads_in_eight_bits_keep_what_is_no_number(path: str) -> None:
    """One scale a row: a NaN or an infinity makes a NaN of it, and of no other."""
    weight = torch.randn(70, 33)
    weight[7, 32], weight[20, 0], weight[64, 16] = torch.nan, torch.inf, -torch.inf
    with ops.use("torch") if path == "torch" else native.use_variant(path):
        out = torch.randn(3, 33) @ ops.quantize_rows(weight).dense(torch.float32).T
        ops.quantize_rows(bits(70, 33))
    assert out.isnan().any(0).nonzero().flatten().tolist() == [7, 20, 64]
    assert out.isnan().all(0).nonzero().flatten().tolist() == [7, 20, 64]


# ---- training ----


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_kernels_over_any_bits(dtype: torch.dtype) -> None:
    def leaf(*shape: int, seed: int) -> Tensor:
        return bits(*shape, dtype=dtype, seed=seed).requires_grad_()

    cos, sin = bits(1, 70, 3, seed=90), bits(1, 70, 3, seed=91)
    indices = torch.randn(70, 4).topk(2).indices
    outputs = [
        ops.rms_norm(leaf(70, 33, seed=1), leaf(33, seed=2), 1e-6),
        ops.swiglu(leaf(70, 33, seed=3), leaf(70, 33, seed=4)),
        ops.rotate(leaf(1, 70, 2, 6, seed=5), cos, sin, True),
        ops.causal_attention(leaf(1, 70, 2, 9, seed=6), leaf(1, 70, 1, 9, seed=7), leaf(1, 70, 1, 5, seed=8), 0.3),
        ops.experts(leaf(70, 33, seed=9), indices, bits(70, 2, seed=10), leaf(4, 14, 33, seed=11), leaf(4, 33, 7, seed=12)),
    ]  # fmt: skip
    for i, out in enumerate(outputs):
        out.backward(bits(*out.shape, dtype=out.dtype, seed=20 + i))
    groups = ops.Groups(70, torch.device("cpu"), torch.tensor([20, 20, 70], dtype=torch.int32))
    a, b = bits(70, 33, dtype=torch.bfloat16), bits(70, 17, dtype=torch.bfloat16)
    ops.grouped_product(a, bits(3, 40, 33, dtype=dtype), groups, torch.float32)
    ops.grouped_gradient(a, b, groups, torch.float32)
    moments = [bits(50, dtype=torch.bfloat16, seed=i) for i in (1, 2)]
    ops.adamw(bits(50), bits(50, seed=3), *moments, torch.ones(()), ops.AdamW(1e-3, 0.9, 0.95, 1e-8, 0.1))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_fp8_kernels_over_any_bits(dtype: torch.dtype, power_of_two: bool) -> None:
    x = bits(150, 261, dtype=dtype)
    groups = ops.Groups(150, torch.device("cpu"), torch.tensor([20, 20, 150], dtype=torch.int32))
    for fixed in (None, torch.tensor([0.0]), torch.tensor([torch.nan])):
        fp8.rows(x, power_of_two, fixed)
        fp8.blocks(x[None], power_of_two, dtype, fixed)
    hidden, weight = bits(150, 2 * 70, dtype=dtype), bits(150, seed=1)
    _, kept = fp8.swiglu(hidden, weight, power_of_two)
    wild = Kept(bits(*kept.codes.shape, dtype=torch.float8_e4m3fn), bits(*kept.scales.shape, seed=2))
    for each in (kept, wild):
        fp8.turn(each, groups, power_of_two, dtype)
        fp8.wide(each, dtype)
        fp8.swiglu_backward(bits(150, 70, dtype=dtype, seed=3), each, weight, groups, power_of_two)
    fp8.both(x, groups, power_of_two)
    fp8.round_e5m6(x)
    fp8.quantize_blocks(x)
