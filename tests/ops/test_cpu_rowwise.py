"""RMSNorm, SwiGLU and RoPE kernels against their references: values and gradients, float32 and BF16, odd widths."""

from __future__ import annotations

import pytest
import torch

from leanseek import native, ops

pytestmark = pytest.mark.skipif(not native.usable_variants(), reason=f"no kernels here: {native.status().detail}")
VARIANTS = native.usable_variants()
DTYPES = [torch.float32, torch.bfloat16]


def compare(function, inputs, variant, dtype):  # type: ignore[no-untyped-def]
    """Values and gradients; the reference computes in float32 from the same inputs, so BF16 differs by its rounding."""
    found = []
    for exact in (False, True):
        leaves = [(t.float() if exact else t).detach().requires_grad_() for t in inputs]
        with ops.use("torch") if exact else native.use_variant(variant):
            out = function(*leaves)
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out.dtype))
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in zip(*found, strict=True):
        assert float((got.float() - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (130, 64), (65, 384)])
def test_rms_norm(variant: str, dtype: torch.dtype, rows: int, width: int) -> None:
    inputs = (torch.randn(rows, width).to(dtype), torch.rand(width) + 0.5)
    compare(lambda x, w: ops.rms_norm(x, w, 1e-6), inputs, variant, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rms_norm_of_a_slice(variant: str) -> None:
    """As MLA norms the latent: columns of a wider projection."""
    compare(
        lambda x, w: ops.rms_norm(x[..., :20], w, 1e-6), (torch.randn(2, 9, 28), torch.rand(20)), variant, torch.float32
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (300, 96)])
def test_swiglu(variant: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    inputs = (4 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
    compare(ops.swiglu, inputs, variant, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotate(variant: str, dtype: torch.dtype, interleave: bool, batch: int) -> None:
    """A strided slice of the query, with one row of angles for all sequences and with one for each."""
    angles = torch.randn(batch, 70, 6)
    x = torch.randn(3, 70, 2, 30).to(dtype)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return ops.rotate(x[..., 18:], angles.cos(), angles.sin(), interleave)

    compare(rotated, (x,), variant, dtype)
    serving = ops.rotate(x[0, ..., 18:], angles[0].cos(), angles[0].sin(), interleave)
    assert torch.equal(serving, ops.rotate(x[:1, ..., 18:], angles[:1].cos(), angles[:1].sin(), interleave)[0])
