"""Grouped products, the experts built on them, and AdamW over BF16 moments: native kernels against torch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanseek import native, ops

pytestmark = pytest.mark.skipif(not native.usable_variants(), reason=f"no kernels here: {native.status().detail}")
VARIANTS = native.usable_variants()
sizes = st.integers(1, 70) | st.sampled_from([96, 127, 130, 257])


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    rows=st.lists(st.just(0) | st.integers(1, 40) | st.sampled_from([127, 520]), min_size=1, max_size=5),
    n=sizes,
    k=sizes,
    kind=st.sampled_from([torch.float32, torch.bfloat16]),
    weight=st.sampled_from([torch.float32, torch.bfloat16]),
    out=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40)
def test_the_three_products(
    variant: str, rows: list[int], n: int, k: int, kind: torch.dtype, weight: torch.dtype, out: torch.dtype
) -> None:
    """Within float32 sums and one rounding to the output; a group without rows gets no product and a zero gradient."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    ends = torch.tensor(rows).cumsum(0).tolist()
    groups = ops.Groups(ends[-1], torch.device("cpu"), torch.tensor(ends, dtype=torch.int32))
    a = torch.randn(ends[-1], k, generator=generator).bfloat16().to(kind)
    c = torch.randn(ends[-1], n, generator=generator).bfloat16().to(kind)
    # what BF16 holds, so that a variant which leaves float32 weights as they are agrees
    b = torch.randn(len(rows), n, k, generator=generator).bfloat16().to(weight)
    with native.use_variant(variant):
        forward = ops.grouped_product(a, b, groups, out)
        inward = ops.grouped_product(c, b.transpose(1, 2), groups, out)
        gradient = ops.grouped_gradient(c, a, groups, out)
        # rows by index, some of them twice
        index = torch.randint(max(1, len(a)), (len(a),), generator=generator)
        assert torch.equal(ops.grouped_product(a, b, groups, out, index), ops.grouped_product(a[index], b, groups, out))
        assert torch.equal(
            ops.grouped_gradient(c, a, groups, out, index), ops.grouped_gradient(c, a[index], groups, out)
        )
    rounding = 2**-8 if out == torch.bfloat16 else 2**-23

    def close(found: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        exact, size = x.double() @ y.double(), x.double().abs() @ y.double().abs()
        assert ((found.double() - exact).abs() <= exact.abs() * rounding + size * (x.shape[1] + 8) * 2**-24).all()

    for group, (start, stop) in enumerate(pairwise([0, *ends])):
        close(forward[start:stop], a[start:stop], b[group].t())
        close(inward[start:stop], c[start:stop], b[group])
        close(gradient[group], c[start:stop].t(), a[start:stop])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "e", "d", "i"), [(1, 1, 2, 8, 8), (37, 3, 8, 48, 24), (100, 4, 32, 33, 17), (600, 2, 4, 128, 64)]
)
def test_experts_in_bf16(variant: str, master: torch.dtype, n: int, k: int, e: int, d: int, i: int) -> None:
    """Nobody chooses expert 0. Held to float32 arithmetic on the same values: a few roundings to BF16 away."""
    torch.manual_seed(n)
    scores = torch.randn(n, e)
    scores[:, 0] = -9
    indices = scores.topk(k).indices
    inputs = [
        torch.randn(n, d).bfloat16(), torch.rand(n, k), (torch.randn(e, 2 * i, d) * d**-0.5).bfloat16().to(master),
        (torch.randn(e, d, i) * i**-0.5).bfloat16().to(master),
    ]  # fmt: skip
    probe = torch.randn(n, d).bfloat16()
    found = []
    for context, kind in ((native.use_variant(variant), None), (ops.use("torch"), torch.float32)):
        leaves = [t.to(kind or t.dtype).clone().requires_grad_() for t in inputs]
        with context:
            out = ops.experts(leaves[0], indices, *leaves[1:])
            out.backward(probe.to(out.dtype))
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fast, exact in zip(*found, strict=True):
        assert fast is not None and exact is not None
        assert float((fast.float() - exact).norm()) <= 0.01 * float(exact.norm())
    assert not found[0][3][0].any() and not found[0][4][0].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_adamw_over_bf16_moments(variant: str) -> None:
    """Weights to float32's last bits; moments to the last bit of BF16, when a sum falls otherwise before rounding."""
    rule = ops.AdamW(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(70_001, generator=generator)
    gradients = [torch.randn(70_001, generator=generator) * 1e-3 for _ in range(3)]
    found = []
    for context in (native.use_variant(variant), ops.use("torch")):
        weight, step = start.clone(), torch.zeros(())
        moments = [torch.zeros_like(weight, dtype=torch.bfloat16) for _ in range(2)]
        with context:
            for gradient in gradients:
                ops.adamw(weight, gradient, *moments, step, rule)
        assert step == 3
        found.append((weight, *moments))
    (weight, *moments), (expected, *exact) = found
    assert torch.allclose(weight, expected, rtol=1e-6, atol=2e-4)  # lr times a last bit of a moment, three times
    assert float((weight - expected).abs().mean()) < 1e-6
    for a, b in zip(moments, exact, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2**-7, atol=4e-6)  # where a sum cancels, of its parts
