"""The native training kernels against their torch references: values and gradients, odd shapes."""

from __future__ import annotations

import pytest
import torch

from leanseek import native, ops

pytestmark = pytest.mark.skipif(not native.usable_variants(), reason=f"no kernels here: {native.status().detail}")
VARIANTS = native.usable_variants()


def both(function, inputs, variant):  # type: ignore[no-untyped-def]
    """(output, gradients) of the kernel and of the reference, which computes in float32, for a random cotangent."""
    found = []
    for context in (native.use_variant(variant), ops.use("torch")):
        leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in inputs]
        if found:
            leaves = [t.float() for t in leaves]
        for leaf in leaves:
            leaf.requires_grad_()
        with context:
            out = function(*leaves)
            probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
            out.backward(probe.to(inputs[0].dtype).to(out.dtype))
        found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    return zip(*found, strict=True)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return float((a.float() - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("b", "t", "h", "kv", "dk", "dv"),
    [(1, 1, 1, 1, 8, 8), (2, 33, 3, 3, 24, 16), (1, 64, 4, 2, 96, 64), (2, 130, 4, 1, 17, 9), (1, 200, 2, 2, 192, 128)],
)
def test_causal_attention(variant: str, b: int, t: int, h: int, kv: int, dk: int, dv: int) -> None:
    q, k, v = torch.randn(b, t, h, dk), torch.randn(b, t, kv, dk), torch.randn(b, t, kv, dv)
    for got, want in both(lambda *x: ops.causal_attention(*x, dk**-0.5), (q, k, v), variant):
        assert close(got, want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_attention_takes_strided_views(variant: str) -> None:
    """v as MLA hands it over: a slice of the up-projection's output."""
    kv = torch.randn(2, 40, 3, 20)
    q = torch.randn(2, 40, 3, 12)
    for got, want in both(lambda a, b: ops.causal_attention(a, b[..., :12], b[..., 12:], 0.3), (q, kv), variant):
        assert close(got, want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(
    ("b", "t", "nope", "rope", "dv"), [(1, 1, 8, 2, 8), (2, 37, 17, 6, 9), (1, 37, 17, 6, 9), (2, 130, 64, 32, 64)]
)
def test_mla_attention(
    variant: str, dtype: torch.dtype, interleave: bool, b: int, t: int, nope: int, rope: int, dv: int
) -> None:
    """Rotation included, by angles for each of two sequences or for both; the shared key is a slice of a projection."""
    inputs = [torch.randn(2, t, *width).to(dtype) for width in ((3, nope + rope), (3, nope + dv), (5 + rope,))]
    angles = torch.randn(b, t, rope // 2)
    cos, sin, scale = angles.cos(), angles.sin(), (nope + rope) ** -0.5

    def attention(q: torch.Tensor, kv: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return ops.mla_attention(q, kv, latent[..., 5:], cos, sin, scale, interleave)

    for got, want in both(attention, inputs, variant):
        assert close(got, want, 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("n", "k", "e", "d", "i"), [(1, 1, 2, 8, 8), (37, 3, 8, 48, 24), (100, 4, 32, 33, 17), (64, 2, 4, 128, 64)]
)
def test_experts(variant: str, n: int, k: int, e: int, d: int, i: int) -> None:
    """Also with experts that nobody chose, whose gradient is zero."""
    scores = torch.randn(n, e)
    scores[:, 0] = -9
    indices = scores.topk(k).indices
    inputs = (torch.randn(n, d), torch.rand(n, k), torch.randn(e, 2 * i, d) * 0.2, torch.randn(e, d, i) * 0.2)
    for got, want in both(lambda x, w, gu, dn: ops.experts(x, indices, w, gu, dn), inputs, variant):
        assert close(got, want)


def test_results_are_the_same_from_run_to_run() -> None:
    """What bit-for-bit resuming rests on: which thread took which task leaves no trace."""
    q, k, v = (torch.randn(2, 150, 4, d, requires_grad=True) for d in (24, 24, 16))
    x = torch.randn(90, 48, requires_grad=True)
    gate_up, down = torch.randn(8, 32, 48, requires_grad=True), torch.randn(8, 48, 16, requires_grad=True)
    weights, indices = torch.rand(90, 3, requires_grad=True), torch.randn(90, 8).topk(3).indices
    found = []
    for _ in range(5):
        out = (
            ops.causal_attention(q, k, v, 0.2).square().sum()
            + ops.experts(x, indices, weights, gate_up, down).square().sum()
        )
        found.append(torch.autograd.grad(out, (q, k, v, x, weights, gate_up, down)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
