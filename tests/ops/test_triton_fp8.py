"""The Triton kernels against the exact arithmetic of leanseek/fp8: on a GPU as compiled, elsewhere by Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from triton import language
from triton.runtime.interpreter import InterpretedFunction

from leanseek import fp8, ops
from leanseek.bench import kernels
from leanseek.gpu import paths
from leanseek.gpu.gemm import grouped_product, grouped_weight_gradient, product
from leanseek.gpu.quantize import (
    quantize_blocks,
    quantize_blocks_both,
    quantize_both,
    quantize_tiles,
    round_e5m6,
    turn_tiles,
)
from leanseek.gpu.swiglu import swiglu_backward_quantize, swiglu_quantize
from leanseek.ops import formats, quantize, use
from leanseek.ops.grouped import group_tiles
from leanseek.ops.operands import Coded, Codes, Kept, cuts, exact_product
from leanseek.ops.quantize import quantize_blocks as stored_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
# Of the sum of magnitudes: how far sums may differ that are added in another order, in FP32 by the interpreter. A tensor
# core cuts each of 32 terms to 14 bits below the largest before it adds them.
SUMS = 32 * 2**-13 if DEVICE == "cuda" else 2**-20


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    interprets = isinstance(language.max, InterpretedFunction)
    assert interprets or DEVICE == "cuda", "triton was imported before TRITON_INTERPRET=1 was set (tests/conftest.py)"


# ---- the oracle ----


def oracle_tiles(x: Tensor, power_of_two: bool = False, tile: tuple[int, int] = (1, 128)) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M, K] and a scale a tile. On the CPU: CUDA divides by a number with its rounded reciprocal."""
    q, scales = formats.quantize(x.cpu(), tile, power_of_two)
    return q.to(FP8).to(DEVICE), scales.to(DEVICE)


def oracle_product(a: Codes, b: Codes, rows_per_scale: int) -> Tensor:
    """FP32 partial sums over each 128 of K, times sa · sb, added in FP32; a [M, K], b [N, K]."""
    wide = [
        Coded(x.codes.float(), formats.spread(x.scales, (rows, 128), x.codes.shape), cuts(x.codes.shape[1]))
        for x, rows in ((a, 1), (b, rows_per_scale))
    ]
    return exact_product(*wide)


def holds(out: Tensor, a: Codes, b: Codes, rows_per_scale: int) -> bool:
    """The product, rounded to out's dtype last: within its last bit, and the order of FP32 sums where terms cancel."""
    expected = oracle_product(a, b, rows_per_scale)
    magnitudes = [Codes(x.codes.float().abs().to(FP8), x.scales) for x in (a, b)]
    last_bit = 2**-7 if out.dtype == torch.bfloat16 else 2**-22
    if DEVICE == "cuda" and float((out.float() - expected).norm() / expected.norm()) > last_bit / 2 + 2**-11:
        return False  # what is cut averages out
    allowed = expected.abs() * last_bit + oracle_product(*magnitudes, rows_per_scale) * SUMS
    return bool(((out.float() - expected.to(out.dtype).float()).abs() <= allowed).all())


def same(codes: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for the sign of a NaN."""
    nan = expected.float().isnan()
    bits, wanted = codes.view(torch.uint8), expected.view(torch.uint8)
    return torch.equal(codes.float().isnan(), nan) and torch.equal(bits[~nan], wanted[~nan])


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 3.0) -> Tensor:
    """Values over many powers of two, so that tiles differ and small values underflow."""
    return (torch.randn(shape) * torch.exp2(spread * torch.randn(shape))).to(dtype).to(DEVICE)


def slices(ends: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise([0, *ends])]


def ends_of(*counts: int) -> tuple[list[int], Tensor]:
    ends = list(itertools.accumulate(counts))
    return ends, torch.tensor(ends, dtype=torch.int32, device=DEVICE)


# ---- quantisers ----


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(1, 128), (37, 200), (130, 256)])
def test_tiles_are_the_oracles_bit_for_bit(m: int, k: int, dtype: torch.dtype, power_of_two: bool) -> None:
    x = draw(m, k, dtype=dtype)
    codes, scales = quantize_tiles(x, power_of_two)
    expected, wanted = oracle_tiles(x, power_of_two)
    assert same(codes, expected) and torch.equal(scales, wanted)


def test_every_code_and_every_tie_between_two_rounds_as_the_format_says() -> None:
    """All E4M3 values, the midpoints between neighbours (ties go to the even code) and their next floats."""
    values = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    values = values[values.isfinite()].unique()
    middle = (values[1:] + values[:-1]) / 2
    x = torch.cat((values, middle, middle.nextafter(torch.tensor(1e9)), middle.nextafter(torch.tensor(-1e9))))
    x = F.pad(x, (0, -x.numel() % 127)).view(-1, 127)
    x = torch.cat((torch.full((x.shape[0], 1), 448.0), x), 1).to(DEVICE)  # so every tile's scale is 1
    codes, scales = quantize_tiles(x)
    assert torch.equal(scales, torch.ones_like(scales))
    assert same(codes, x.to(FP8))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_nan_in_the_codes_and_spoils_nothing_else(bad: float) -> None:
    x = draw(130, 256, dtype=torch.float32)
    x[3, 5] = bad
    codes, turned = quantize_both(x)
    for q in (codes.codes, turned.codes.t()[:130]):
        assert q.float().isnan().nonzero().tolist() == [[3, 5]]
    assert same(codes.codes, oracle_tiles(x)[0])


def test_zeros_and_the_smallest_values_have_a_scale_that_divides() -> None:
    x = torch.zeros(3, 256, device=DEVICE)
    x[1, 7], x[2, 200] = 1e-45, -3e-39
    codes, scales = quantize_tiles(x)
    expected, wanted = oracle_tiles(x)
    assert scales[0].tolist() == [1.0, 1.0] and torch.equal(scales, wanted) and same(codes, expected)


def test_powers_of_two_are_kept_and_what_is_above_goes_to_the_next() -> None:
    """Scales of exactly 2^e, the next float and the last below."""
    exact = 448 * torch.exp2(torch.arange(-20.0, 20.0))
    up, down = exact.nextafter(torch.tensor(1e30)), exact.nextafter(torch.tensor(0.0))
    x = torch.zeros(120, 128)
    x[:, 3] = torch.cat((exact, up, down))
    x = x.to(DEVICE)
    codes, scales = quantize_tiles(x, power_of_two=True)
    expected, wanted = oracle_tiles(x, power_of_two=True)
    assert same(codes, expected) and torch.equal(scales, wanted)
    assert (scales[:40].cpu() == torch.exp2(torch.arange(-20.0, 20.0))[:, None]).all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("m", "k"), [(5, 128), (200, 192)])
def test_turned_tiles_are_those_of_the_transposed_matrix(m: int, k: int, power_of_two: bool) -> None:
    x = draw(m, k)
    straight, turned = quantize_both(x, power_of_two)
    padded = F.pad(x, (0, 0, 0, -m % 128))
    for (codes, scales), (expected, wanted) in (
        (straight, oracle_tiles(x, power_of_two)),
        (turned, oracle_tiles(padded.t(), power_of_two)),
    ):
        assert same(codes, expected) and torch.equal(scales, wanted)


def test_turning_what_was_kept_is_turning_its_values() -> None:
    """From codes, with rows in the order of the experts, some of them twice."""
    kept, index = quantize_tiles(draw(90, 200), True), torch.randint(0, 90, (171,), device=DEVICE)
    tiles = group_tiles(ends_of(0, 130, 41)[1], 171)
    wide = (kept.codes.float() * kept.scales.repeat_interleave(128, 1)[:, :200])[index]
    found, expected = turn_tiles(kept, True, tiles, index), quantize_both(wide, True, tiles)[1]
    used = slice(0, 128 * int(tiles.first[-1]))
    assert same(found.codes[:, used], expected.codes[:, used])
    assert torch.equal(found.scales[:, :3], expected.scales[:, :3])


def test_rows_of_a_slice_need_not_be_contiguous() -> None:
    x = draw(40, 512)[:, 128:384]
    assert same(quantize_tiles(x).codes, oracle_tiles(x)[0])
    assert same(quantize_tiles(x.t()).codes, oracle_tiles(x.t())[0])


def test_turned_tiles_never_hold_two_experts() -> None:
    ends, on_device = ends_of(0, 130, 1, 0, 128, 41)
    x = draw(ends[-1], 256)
    tiles = group_tiles(on_device, x.shape[0])
    straight, turned = quantize_both(x, tiles=tiles)
    assert same(straight.codes, oracle_tiles(x)[0])
    for expert, rows in enumerate(slices(ends)):
        first, last = tiles.first[expert : expert + 2].tolist()
        padded = F.pad(x[rows], (0, 0, 0, -(rows.stop - rows.start) % 128))
        expected, wanted = oracle_tiles(padded.t())
        assert same(turned.codes[:, first * 128 : last * 128], expected)
        assert torch.equal(turned.scales[:, first:last], wanted)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(128, 128), (192, 300), (2, 130, 64)])
def test_weight_blocks_are_the_oracles_and_turn_with_the_same_codes(shape: tuple[int, ...], power_of_two: bool) -> None:
    w = draw(*shape, dtype=torch.float32)
    found = quantize_blocks_both(w, power_of_two)
    for q, s, q_t, s_t, x in zip(*(v.reshape(-1, *v.shape[-2:]) for v in (*found, w)), strict=True):
        expected, wanted = oracle_tiles(x, power_of_two, (128, 128))
        assert same(q, expected) and torch.equal(s, wanted)
        assert same(q_t, expected.t().contiguous()) and torch.equal(s_t, wanted.t())


def test_stored_blocks_are_made_by_this_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op of leanseek/fp8 finds it in the dispatch table; the GPU is pretended where there is none."""
    monkeypatch.setattr("leanseek.gpu.device.refusal", lambda device: "")
    calls: list[Tensor] = []

    def seen(weight: Tensor) -> Codes:
        calls.append(weight)
        return quantize_blocks(weight)

    monkeypatch.setattr("leanseek.gpu.quantize.quantize_blocks", seen)
    w = draw(192, 300, dtype=torch.float32)
    with use("gpu"):
        codes, scales = stored_blocks(w)
    expected, wanted = oracle_tiles(w, False, (128, 128))
    assert len(calls) == 1 and same(codes, expected) and torch.equal(scales, wanted)


# ---- products ----


def blocks(*shape: int) -> Codes:
    return quantize_blocks(draw(*shape, dtype=torch.float32, spread=1.0))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 128), (5, 200, 384), (130, 257, 192), (256, 128, 1024)])
def test_product_over_weight_blocks(m: int, n: int, k: int) -> None:
    a, b = quantize_tiles(draw(m, k)), blocks(n, k)
    assert holds(product(a, b), a, b, 128)


def test_product_adds_in_fp32_and_rounds_last() -> None:
    """256 and then 1 a block: a sum in BF16 would lose every 1."""
    a, b = quantize_tiles(torch.full((1, 2560), 448.0, device=DEVICE)), blocks(128, 2560)
    b.codes.zero_()
    b.codes[0, 0], b.codes[0, 128::128] = 256.0, 1.0
    b.scales.fill_(1.0)
    assert product(a, b, torch.float32)[0, 0].item() == 448.0 * (256 + 19)
    assert product(a, b)[0, 0].item() == torch.tensor(448.0 * (256 + 19)).bfloat16().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_gradient_over_turned_tiles(dtype: torch.dtype) -> None:
    dy, x = (quantize_both(draw(300, width))[1] for width in (136, 200))
    out = product(dy, x, dtype)
    assert out.dtype == dtype and holds(out, dy, x, 1)


COUNTS = [(7,), (0, 130, 1, 0, 128, 41), (0, 0, 3), (256, 0)]


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_product(counts: tuple[int, ...]) -> None:
    ends, on_device = ends_of(*counts)
    a, b = quantize_tiles(draw(ends[-1], 192)), blocks(len(counts), 200, 192)
    out = grouped_product(a, b, group_tiles(on_device, ends[-1]))
    for expert, rows in enumerate(slices(ends)):
        own = Codes(a.codes[rows], a.scales[rows]), Codes(b.codes[expert], b.scales[expert])
        assert holds(out[rows], *own, 128)


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_weight_gradient(counts: tuple[int, ...]) -> None:
    ends, on_device = ends_of(*counts)
    tiles = group_tiles(on_device, ends[-1])
    dy, x = (quantize_both(draw(ends[-1], width), tiles=tiles)[1] for width in (130, 256))
    out = grouped_weight_gradient(dy, x, tiles, torch.bfloat16)
    for expert, gradient in enumerate(out):
        first, last = tiles.first[expert : expert + 2].tolist()
        own = [Codes(t.codes[:, first * 128 : last * 128], t.scales[:, first:last]) for t in (dy, x)]
        assert holds(gradient, *own, 1)
        assert counts[expert] or not gradient.any()


def test_rows_of_no_expert_change_nothing() -> None:
    """Rows past the last end, as in a buffer of fixed size, take part in no product."""
    ends, on_device = ends_of(30, 100)
    x = draw(200, 128)
    x[ends[-1] :] = torch.nan
    tiles = group_tiles(on_device, 200)
    _, turned = quantize_both(x, tiles=tiles)
    assert grouped_weight_gradient(turned, turned, tiles).isfinite().all()


# ---- SwiGLU ----


def close_codes(ours: Codes, expected: Tensor) -> None:
    """Values that were quantised from the same float32 up to the last bits of exp: a few codes may round the other way."""
    codes, scales = oracle_tiles(expected)
    torch.testing.assert_close(ours.scales, scales, rtol=1e-5, atol=0)
    differs = (ours.codes.view(torch.uint8) != codes.view(torch.uint8)).float().mean()
    assert differs < 0.002
    wide = scales.repeat_interleave(128, 1)[:, : codes.shape[1]]
    torch.testing.assert_close(ours.codes.float() * wide, codes.float() * wide, rtol=0.13, atol=wide.max().item() / 256)


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_quantize(weighted: bool) -> None:
    hidden = draw(37, 512, spread=1.0)
    weight = torch.rand(37, device=DEVICE) if weighted else None
    gate, up = hidden.float().chunk(2, 1)
    act, kept = swiglu_quantize(hidden, weight)
    close_codes(act, F.silu(gate) * up * (1 if weight is None else weight[:, None]))
    codes, scales = oracle_tiles(hidden)
    assert same(kept.codes, codes) and torch.equal(kept.scales, scales)


@pytest.mark.parametrize("counts", [None, (0, 130, 1, 41)])
def test_swiglu_backward_quantize(counts: tuple[int, ...] | None) -> None:
    ends, on_device = ends_of(*(counts or (150,)))
    m = ends[-1]
    tiles = group_tiles(on_device, m) if counts else None
    hidden = quantize_tiles(draw(m, 256, spread=1.0))
    values = (hidden.codes.float() * hidden.scales.repeat_interleave(128, 1)).requires_grad_()
    weight = torch.rand(m, device=DEVICE).requires_grad_()
    gate, up = values.chunk(2, 1)
    act = F.silu(gate) * up * weight[:, None]
    grad = draw(m, 128, spread=1.0)
    act.backward(grad.float())
    assert values.grad is not None and weight.grad is not None
    found = swiglu_backward_quantize(grad, hidden, weight.detach(), tiles)
    close_codes(found.hidden, values.grad)
    torch.testing.assert_close(found.weight, weight.grad, rtol=1e-4, atol=1e-4)
    for turned, expected in ((found.hidden_t, values.grad), (found.act_t, act.detach())):
        for expert, rows in enumerate(slices(ends)):
            first, last = tiles.first[expert : expert + 2].tolist() if tiles else (0, 2)
            part = F.pad(expected[rows], (0, 0, 0, -(rows.stop - rows.start) % 128)).t()
            if first < last:
                close_codes(Codes(turned.codes[:, first * 128 : last * 128], turned.scales[:, first:last]), part)


# ---- the layers of training ----


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanseek.gpu.device.refusal", lambda device: "")
    monkeypatch.setattr(paths, "_RAN", Counter())


def run_layer(
    layer: Callable[..., Tensor], backend: str, *inputs: Tensor, recipe: fp8.Tilewise | None = None
) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.to(DEVICE, copy=True).requires_grad_(t.is_floating_point()) for t in inputs]
    with use(backend):
        out = layer(*leaves, fp8.Cast(recipe or fp8.Tilewise()))
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out))
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, cast: fp8.Cast) -> Tensor:
    sent = ops.expert_dispatch(x, indices, weights, gate_up.shape[0])
    return ops.expert_combine(fp8.expert_products(sent, gate_up, down, cast), sent)


def near(found: list[Tensor], expected: list[Tensor]) -> None:
    """A last bit of a pre-activation that rounds otherwise moves a code of E4M3 by a step, now and then; a tensor core's
    sums of 14 bits more often."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert float((a.float() - b.float()).norm() / b.float().norm()) < (2e-2 if DEVICE == "cuda" else 5e-3)


@pytest.mark.parametrize(("m", "k", "n"), [(130, 192, 136), (7, 100, 64)])
def test_linear_is_that_of_the_exact_arithmetic(m: int, k: int, n: int, on_gpu: None) -> None:
    inputs = torch.randn(m, k).bfloat16(), torch.randn(n, k) * 0.05
    found = run_layer(fp8.linear, "gpu", *inputs)
    assert paths.ran()["product"] and paths.ran()["weight gradient"]
    near(found, run_layer(fp8.linear, "torch", *inputs))


SLOW = pytest.mark.slow  # the interpreter takes seconds, and what ends within a tile is the harder case


@pytest.mark.parametrize("size", [pytest.param(128, marks=SLOW), 200])
def test_mlp_is_that_of_the_exact_arithmetic(size: int, on_gpu: None) -> None:
    """200: gate and up end within a tile, and are padded."""
    inputs = torch.randn(140, 192).bfloat16(), *(torch.randn(size, 192) * 0.1 for _ in range(2)), torch.randn(192, size)
    near(*(run_layer(fp8.mlp, backend, *inputs) for backend in ("gpu", "torch")))


@pytest.mark.parametrize("size", [pytest.param(128, marks=SLOW), 72])
def test_experts_are_those_of_the_exact_arithmetic(size: int, on_gpu: None) -> None:
    """Experts 2 and 5 of six get nobody, expert 0 more than a tile."""
    indices = torch.tensor([[0, 1], [0, 3], [4, 0]])[torch.randint(0, 3, (150,))]
    inputs = (
        torch.randn(150, 128).bfloat16(), indices, torch.rand(150, 2),
        torch.randn(6, 2 * size, 128) * 0.1, torch.randn(6, 128, size) * 0.1,
    )  # fmt: skip
    found = run_layer(experts, "gpu", *inputs)
    assert paths.ran()["grouped product"] and paths.ran()["grouped weight gradient"]
    near(found, run_layer(experts, "torch", *inputs))
    assert not found[3][[2, 5]].any() and not found[4][[2, 5]].any()


def test_tiles_hold_blocks_of_gradients_exactly(on_gpu: None) -> None:
    """Two experts' rows, gate and up with blocks of their own: the values are those of the exact arithmetic."""
    _, on_device = ends_of(100, 30)
    x, groups = draw(130, 256, dtype=torch.float32), ops.Groups(130, torch.device(DEVICE), on_device)
    with use("torch"):
        exact = quantize.both_blocks(x, groups, torch.bfloat16, 2).rows
    with use("gpu"):
        rows, turned = quantize.both_blocks(x, groups, torch.bfloat16, 2)
    assert isinstance(exact, Coded) and isinstance(rows, Codes) and isinstance(turned, Codes)
    expected, transposed = exact.codes * exact.scale, Kept(turned.codes, turned.scales).wide().t()
    assert torch.equal(Kept(*rows).wide(), expected)
    assert torch.equal(torch.cat((transposed[:100], transposed[128:158])), expected)


def test_gradients_in_blocks_are_those_of_the_exact_arithmetic(on_gpu: None) -> None:
    inputs = torch.randn(9, 64).bfloat16(), *(torch.randn(40, 64) * 0.1 for _ in range(2)), torch.randn(64, 40)
    near(*(run_layer(fp8.mlp, backend, *inputs, recipe=fp8.GradientBlocks()) for backend in ("gpu", "torch")))


def test_e5m6_is_the_oracles() -> None:
    x = torch.cat((draw(5, 300), draw(3, 300) * 1e-30))
    x[1, 2], x[2, 0], x[3] = torch.inf, torch.nan, 0
    torch.testing.assert_close(
        round_e5m6(x), ops.quantize.round_e5m6(x.cpu()).to(DEVICE), rtol=0, atol=0, equal_nan=True
    )


# ---- which path a product takes ----


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 with cuBLASLt and DeepGEMM, as far as `paths` can tell: what they ask of strides is asked, and the
    oracle computes."""

    def scaled_mm(a, b, sa, recipe_a, sb, recipe_b, output_dtype, use_fast_accum):  # type: ignore[no-untyped-def]
        (m, k), n, scaling = a.shape, b.shape[1], F.ScalingType
        kb, nb = -(-k // 128), -(-n // 128)
        assert a.is_contiguous() and b.t().is_contiguous() and not use_fast_accum
        assert recipe_a == scaling.BlockWise1x128 and sa.shape == (m, kb) and sa.stride() == (1, m)
        if recipe_b == scaling.BlockWise128x128:
            padded = -(-kb // 4) * 4
            assert sb.shape == (padded, nb) and sb.stride() == (1, padded)
            return oracle_product(Codes(a, sa), Codes(b.t(), sb.t()), 128).to(output_dtype)
        assert recipe_b == scaling.BlockWise1x128 and sb.shape == (n, kb) and sb.stride() == (1, n)
        return oracle_product(Codes(a, sa), Codes(b.t(), sb), 1).to(output_dtype)

    class DeepGemm:
        @staticmethod
        def fp8_gemm_nt(a, b, out):  # type: ignore[no-untyped-def]
            assert a[1].stride(0) == 1 and a[1].stride(1) % 4 == 0 and b[1].is_contiguous()
            out.copy_(oracle_product(Codes(*a), Codes(*b), 128))

        @staticmethod
        def m_grouped_fp8_gemm_nt_contiguous(a, b, out, expert):  # type: ignore[no-untyped-def]
            """A block of 128 rows is one expert's, or nobody's and left alone."""
            assert expert.dtype == torch.int32 and expert.shape == a[0].shape[:1] and a[1].stride(0) == 1
            for t, e in enumerate(expert.view(-1, 128)):
                assert (e == e[0]).all()
                rows = slice(128 * t, 128 * (t + 1))
                own = Codes(a[0][rows], a[1][rows]), Codes(b[0][e[0]], b[1][e[0]])
                out[rows] = oracle_product(*own, 128) if e[0] >= 0 else torch.nan

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    monkeypatch.setattr(paths, "_library", DeepGemm)
    monkeypatch.setattr(paths, "_refusal", lambda path, *_: "absent" if path == "hopper" else "")
    monkeypatch.setattr(paths, "_RAN", Counter())


def test_libraries_get_the_layouts_that_they_ask_for(libraries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = quantize_tiles(draw(12, 640)), blocks(256, 640)
    assert holds(paths.product(a, b), a, b, 128)
    monkeypatch.setattr(paths, "_refusal", lambda path, *_: "" if path == "cublaslt" else "absent")
    assert holds(paths.product(a, b), a, b, 128)
    turned = quantize_blocks_both(draw(256, 640, dtype=torch.float32)).transpose(
        0, 1
    )  # what the input's gradient multiplies by
    grad = quantize_tiles(draw(12, 256))
    assert holds(paths.product(grad, turned), grad, Codes(*turned[:2]), 128)
    dy, x = (quantize_both(draw(300, width))[1] for width in (136, 208))
    assert holds(paths.product(dy, x, torch.float32), dy, x, 1)
    assert paths.ran() == {"product": {"cublaslt": 2, "deepgemm": 1}, "weight gradient": {"cublaslt": 1}}


def test_operands_that_a_library_does_not_take_go_to_triton(libraries: None) -> None:
    a, b = quantize_tiles(draw(7, 192)), blocks(200, 192)  # neither rows in fours nor widths in 128
    assert holds(paths.product(a, b), a, b, 128)
    assert paths.ran() == {"product": {"triton": 1}}


@pytest.mark.parametrize("counts", COUNTS)
def test_rows_are_padded_for_deepgemm_and_come_back(counts: tuple[int, ...], libraries: None) -> None:
    ends, on_device = ends_of(*counts)
    a, b = quantize_tiles(draw(ends[-1], 256)), blocks(len(counts), 192, 256)
    out = paths.grouped_product(a, b, group_tiles(on_device, ends[-1]))
    for expert, rows in enumerate(slices(ends)):
        own = Codes(a.codes[rows], a.scales[rows]), Codes(b.codes[expert], b.scales[expert])
        assert holds(out[rows], *own, 128)
    assert paths.ran() == {"grouped product": {"deepgemm": 1}}


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_every_library_has_a_reason_and_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_RAN", Counter())
    a, b = quantize_tiles(draw(16, 256)), blocks(64, 256)
    assert holds(paths.product(a, b), a, b, 128)
    assert paths.ran() == {"product": {"triton": 1}}
    assert set(paths.status(torch.device("cpu")).values()) == {"no CUDA device"}


@pytest.mark.slow  # the interpreter takes six seconds; each kernel has its own test above
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/bench runs it on the GPU")
def test_the_bench_of_a_gpu_names_the_path_that_computed_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cases fit the kernels: the smallest size, by the interpreter."""
    monkeypatch.setattr("leanseek.gpu.device.refusal", lambda device: "")
    found: dict[str, dict[str, Any]] = {}
    for group in kernels._gpu_cases(128, torch.device("cpu")):
        found |= kernels._take_turns(group, 1, torch.device("cpu"))
    assert {"FP8 128×128×128", "quantise 1×128 and transpose", "SwiGLU backward and quantise"} <= found.keys()
    named = {name: result["path"] for name, result in found.items() if "path" in result}
    assert len(named) == 6 and set(named.values()) == {"triton"}
    assert found["FP8 128×128×128"]["against"] == "BF16 torch.mm 128×128×128"


# ---- for the GPU ----


@pytest.mark.slow  # two processes that import torch and compile; `make test` runs the same kernels interpreted
@pytest.mark.parametrize("name", ["compile_triton_fp8.py", "compile_hopper.py"])
def test_every_kernel_compiles_for_an_h100(name: str) -> None:
    """The compiler needs no GPU: products use the FP8 tensor cores, casts saturate, and nothing spills."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name(name)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["product", "weight gradient"])
def test_the_path_that_runs_on_this_gpu_agrees_with_the_oracle(form: str) -> None:
    a = quantize_tiles(draw(512, 7168))
    b = blocks(2048, 7168) if form == "product" else quantize_tiles(draw(2048, 7168))
    before = paths.ran().get(form, {})
    assert holds(paths.product(a, b), a, b, 128 if form == "product" else 1)
    assert paths.ran()[form] != before


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [(300,), (0, 130, 1, 0, 128, 41)])
def test_our_own_for_sm90_agrees_with_the_oracle(counts: tuple[int, ...]) -> None:
    """Rows and columns that end within a tile, experts without rows."""
    from leanseek.gpu import hopper

    ends, on_device = ends_of(*counts)
    tiles, x, dy = group_tiles(on_device, ends[-1]), draw(ends[-1], 528), draw(ends[-1], 272)
    a, b = quantize_tiles(x), blocks(len(counts), 272, 528)
    out = hopper.grouped_product(a, b, tiles)
    turned = [quantize_both(t, tiles=tiles)[1] for t in (dy, x)]
    gradients = hopper.grouped_weight_gradient(*turned, tiles)
    for expert, rows in enumerate(slices(ends)):
        own = Codes(a.codes[rows], a.scales[rows]), Codes(b.codes[expert], b.scales[expert])
        assert holds(out[rows], *own, 128)
        first, last = tiles.first[expert : expert + 2].tolist()
        own = tuple(Codes(t.codes[:, first * 128 : last * 128], t.scales[:, first:last]) for t in turned)
        assert holds(gradients[expert], *own, 1) if counts[expert] else not gradients[expert].any()
    if len(counts) == 1:
        whole = Codes(b.codes[0], b.scales[0])
        assert holds(hopper.product(a, whole), a, whole, 128)


@pytest.mark.gpu
def test_nan_codes_reach_the_product_on_this_gpu() -> None:
    x = draw(256, 512)
    x[5, 300] = torch.inf
    out = paths.product(quantize_tiles(x), blocks(384, 512))
    assert out.isnan().any(1).nonzero().tolist() == [[5]]
