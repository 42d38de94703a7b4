"""Linear, feed-forward and experts in FP8 against the arithmetic written out, and against float32."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leanseek import fp8, ops
from leanseek.fp8 import Cast, GradientBlocks, Tensorwise, Tilewise
from leanseek.model.layers import Linear
from leanseek.ops import quantize as q
from leanseek.ops.formats import Counts

# ---- the oracle: float64 sums of products of torch's own 8-bit codes, scaled a piece of 128 at a time ----


def scale_of(block: Tensor) -> float:
    amax = float(block.abs().max())
    return 2.0 ** torch.tensor(amax / 448).log2().ceil().item() if amax else 1.0


def coded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x in tiles of rows × columns, dequantised, float64: exact, as scales are powers of two."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for r in range(0, x.shape[0], rows):
        for c in range(0, x.shape[1], columns):
            tile = x[r : r + rows, c : c + columns].double()
            scale = scale_of(tile)
            out[r : r + rows, c : c + columns] = (tile / scale).float().to(torch.float8_e4m3fn).double() * scale
    return out


def close(found: Tensor, a: Tensor, b: Tensor) -> None:
    """found = a · bᵀ to within float32 sums and one rounding to BF16."""
    exact, size = a @ b.t(), a.abs() @ b.abs().t()
    bound = exact.abs() * 2**-8 + size * (a.shape[1] + 8) * 2**-24 + 1e-37
    assert ((found.double() - exact).abs() <= bound).all()


def run(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Output, then the gradients of the inputs that take one, for a fixed gradient of the output."""
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    out = function(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype))
    return out.detach(), *(t.grad for t in leaves if t.grad is not None)


@pytest.mark.parametrize("backend", ["native", "torch"])
@given(m=st.integers(1, 300), k=st.integers(1, 300), n=st.integers(1, 300), seed=st.integers(0, 99))
def test_all_three_products_are_those_of_the_codes(backend: str, m: int, k: int, n: int, seed: int) -> None:
    """Held to: 1×128 by 128×128 forward, 1×128 by 128×128 for dx, 128×1 by 128×1 along the tokens for dw."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.randn(m, 1, generator=generator).exp()
    x, weight = x.bfloat16(), torch.randn(n, k, generator=generator) * 0.05
    with ops.use(backend):
        out, dx, dw = run(lambda x, w: fp8.linear(x, w, Cast(Tilewise())), x, weight)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    w, kept = coded(weight, 128, 128), coded(x, 1, 128)
    close(out, kept, w)
    close(dx, coded(grad, 1, 128), w.t())
    close(dw.float(), coded(grad, 128, 1).t(), coded(kept, 128, 1).t())
    assert out.dtype == dx.dtype == torch.bfloat16
    assert dw.dtype == torch.float32


@pytest.mark.parametrize("backend", ["native", "torch"])
@given(m=st.integers(1, 300), k=st.integers(1, 300), n=st.integers(1, 300), seed=st.integers(0, 99))
def test_gradients_in_blocks_are_those_of_the_codes(backend: str, m: int, k: int, n: int, seed: int) -> None:
    """Appendix B.2: only the gradient is cast otherwise, and its codes serve both products of backward."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(m, k, generator=generator).bfloat16(), torch.randn(n, k, generator=generator) * 0.05
    with ops.use(backend):
        out, dx, dw = run(lambda x, w: fp8.linear(x, w, Cast(GradientBlocks())), x, weight)
        assert torch.equal(out, fp8.linear(x, weight, Cast(Tilewise())))
    grad = coded(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16(), 128, 128)
    close(dx, grad, coded(weight, 128, 128).t())
    close(dw.float(), grad.t(), coded(coded(x, 1, 128), 128, 1).t())


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, cast: Cast) -> Tensor:
    sent = ops.expert_dispatch(x, indices, weights, gate_up.shape[0])
    return ops.expert_combine(fp8.expert_products(sent, gate_up, down, cast), sent)


def experts_case(tokens: int = 200, size: int = 128) -> tuple[Tensor, ...]:
    """Experts 2 and 5 of six get nobody; expert 0 gets more than one band of 128."""
    choices = torch.tensor([[0, 1], [0, 3], [4, 0]])
    indices = choices[torch.randint(0, 3, (tokens,))]
    x, weights = torch.randn(tokens, 96).bfloat16(), torch.rand(tokens, 2)
    return x, indices, weights, torch.randn(6, 2 * size, 96) * 0.1, torch.randn(6, 96, size) * 0.1


@pytest.mark.parametrize("recipe", [Tilewise(), GradientBlocks()], ids=["tiles", "blocks"])
@pytest.mark.parametrize("size", [128, 40, 200])
def test_experts_fast_path_is_the_exact_one(size: int, recipe: Tilewise) -> None:
    case = experts_case(size=size)
    run_experts = lambda *inputs: experts(*inputs, Cast(recipe))  # noqa: E731
    fast = run(run_experts, *case)
    with ops.use("torch"):
        exact = run(run_experts, *case)
    for a, b in zip(fast, exact, strict=True):
        # a last bit of BF16 that falls otherwise in the pre-activation moves a code of E4M3 by a step, now and then
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 4e-3
    assert not fast[3][[2, 5]].any() and not fast[4][[2, 5]].any()


def test_one_expert_for_all_is_the_mlp() -> None:
    x, gate, up, down = torch.randn(150, 64).bfloat16(), *(torch.randn(40, 64) for _ in range(2)), torch.randn(64, 40)
    whole = run(lambda *t: fp8.mlp(*t, Cast(Tilewise())), x, gate, up, down)
    ones, zeros = torch.ones(150, 1), torch.zeros(150, 1, dtype=torch.long)
    routed = run(
        lambda x, w, gu, d: experts(x, zeros, w, gu, d, Cast(Tilewise())),
        x, ones, torch.cat((gate, up))[None], down[None],
    )  # fmt: skip
    assert torch.equal(whole[0], routed[0])
    assert torch.equal(whole[1], routed[1])
    assert torch.equal(torch.cat(whole[2:4]), routed[3][0])
    assert torch.equal(whole[4], routed[4][0])


@pytest.mark.parametrize(
    "recipe",
    [Tilewise(), Tilewise(power_of_two=False), GradientBlocks(), Tensorwise()],
    ids=["p2", "fp32", "blocks", "whole"],
)
def test_outputs_and_gradients_are_near_float32(recipe: Tilewise) -> None:
    """Rounding to three bits of mantissa, uncorrelated: a few per cent of a product's norm, no more, no bias."""
    x, indices, weights, gate_up, down = experts_case()
    found = run(lambda *t: experts(*t, Cast(recipe)), x, indices, weights, gate_up, down)
    with ops.use("torch"):
        expected = run(ops.experts, x.float(), indices, weights, gate_up, down)
    for a, b in zip(found, expected, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.08
        assert 0.97 < float((a.float() * b).sum() / b.square().sum()) < 1.03


def test_nothing_that_is_not_finite_is_lost() -> None:
    x = torch.randn(4, 130).bfloat16()
    x[1, 3] = float("inf")
    out = fp8.linear(x, torch.randn(16, 130), Cast(Tilewise()))
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_weights_are_cast_once_until_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches and backward share a cast; a step in place makes a new one."""
    calls: list[int] = []
    blocks = q.blocks
    monkeypatch.setattr(q, "blocks", lambda *a: calls.append(1) or blocks(*a))
    weight, cast = torch.nn.Parameter(torch.randn(64, 64)), Cast(Tilewise())
    for _ in range(3):
        fp8.linear(torch.randn(4, 64).bfloat16().requires_grad_(), weight, cast).sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        weight.mul_(2)
    fp8.linear(torch.randn(4, 64).bfloat16(), weight, cast)
    assert len(calls) == 2


def test_readers_of_one_input_share_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    rows = q.rows
    monkeypatch.setattr(q, "rows", lambda *a: calls.append(1) or rows(*a))
    x = torch.randn(4, 64).bfloat16()
    recipe = Tilewise()
    first = fp8.linear(x, torch.eye(64), Cast(recipe))
    assert torch.equal(first, fp8.linear(x, torch.eye(64), Cast(recipe)))
    assert len(calls) == 1
    assert torch.equal(fp8.linear(x.clone(), torch.eye(64), Cast(recipe)), first) and len(calls) == 2
    assert torch.equal(fp8.linear(x, torch.eye(64), Cast(recipe)), first)
    x.mul_(2)  # the shared codes are those of its values
    assert torch.equal(fp8.linear(x, torch.eye(64), Cast(recipe)), 2 * first)
    del x  # nor do they outlive it
    assert recipe._latest is None


def test_an_input_is_kept_in_one_byte_a_value() -> None:
    """torchao's blockwise linear keeps BF16 and saves nothing."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x, weight = torch.randn(256, 512).bfloat16(), torch.nn.Parameter(torch.randn(64, 512))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fp8.linear(x * 1, weight, Cast(Tilewise()))
    size = sum(t.untyped_storage().nbytes() for t in kept if t.data_ptr() != weight.data_ptr())
    assert size <= 1.04 * x.numel()


def test_what_is_recomputed_is_not_kept_and_the_gradients_are_the_same() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    plain = torch.autograd.grad((x.exp() * 2).square().sum(), x)[0]
    made: list[int] = []
    y = x.exp() * 2
    with fp8.Recomputed((y, lambda: made.append(1) or x.detach().exp() * 2)):
        loss = y.t().square().sum()
    y.data.fill_(7)  # whoever kept it would see this
    assert torch.equal(torch.autograd.grad(loss, x)[0], plain)
    assert made


def test_counts_can_be_read_for_each_tensor() -> None:
    model = torch.nn.Module()
    model.proj = Linear(8, 8, None, torch.float32)
    torch.nn.init.ones_(model.proj.weight)
    fp8.apply(model, "fp8")
    seen = fp8.observe(model)
    x = torch.ones(2, 8).bfloat16()
    x[0, 0] = 2.0**-30
    x.requires_grad_()
    model.proj(x).sum().backward()
    assert seen["proj"]["input"] == Counts(saturated=0, underflowed=1, total=16)
    assert set(seen["proj"]) == {"input", "weight", "gradient"}


def test_a_scale_for_the_whole_tensor_is_visibly_worse_beside_one_outlier() -> None:
    """Why tiles matter (3.3.1): one token 2^14 times as large leaves the others few values."""
    x, weight = torch.randn(256, 384).bfloat16(), torch.randn(128, 384)
    x[0] *= 2.0**14
    expected = F.linear(x[1:].float(), weight)

    def error(recipe: Tilewise) -> float:
        found = fp8.linear(x, weight, Cast(recipe))[1:].float()
        return float((found - expected).norm() / expected.norm())

    assert error(Tilewise()) < 0.05
    assert error(Tensorwise()) > 3 * error(Tilewise())


def test_a_token_with_a_large_gradient_spoils_its_block_and_no_other() -> None:
    """What B.2 takes for the cause of the divergence. Blocks end where an expert's rows do."""
    grad = torch.randn(200, 256).bfloat16()
    grad[3, 5] = 2.0**30
    groups = ops.Groups(200, torch.device("cpu"), torch.tensor([100, 100, 200], dtype=torch.int32))
    tiles, blocks = (recipe.both(grad, groups).rows for recipe in (Tilewise(), GradientBlocks()))
    assert isinstance(tiles, Tensor) and isinstance(blocks, Tensor)
    spoilt = torch.zeros(200, 256, dtype=torch.bool)
    spoilt[:100, :128] = True  # the first expert's rows, the outlier's columns
    spoilt[3] = False
    assert tiles[spoilt].abs().gt(0).float().mean() > 0.99
    assert not blocks[spoilt].any()
    spoilt[3, :128] = True
    assert float((blocks - grad)[~spoilt].norm() / grad[~spoilt].norm()) < 0.04


def test_bands_end_where_experts_do() -> None:
    ends = [0, 5, 5, 300, 428]
    bands = ops.Groups(428, torch.device("cpu"), torch.tensor(ends, dtype=torch.int32)).bands.tolist()
    assert set(ends) <= set(bands)
    assert all(0 < b - a <= 128 for a, b in pairwise(bands))
