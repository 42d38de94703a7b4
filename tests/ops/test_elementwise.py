"""RMSNorm, RoPE, SwiGLU, linears and FP8 blocks against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leanseek import ops


def check_gradients(function, inputs: tuple[Tensor, ...], expected, tolerance: float = 1e-4) -> None:
    """Same value, and the same gradients under random weights on the output."""
    ours, theirs = ([t.detach().clone().requires_grad_() for t in inputs] for _ in range(2))
    a, b = function(*ours), expected(*theirs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=tolerance, atol=tolerance)


# ---- RMSNorm ----


@pytest.mark.parametrize("shape", [(1,), (7, 5), (2, 3, 64), (0, 8), (4, 1, 33)])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_rms_norm(shape: tuple[int, ...], eps: float, form: str) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    expected = []
    for row in x.reshape(-1, shape[-1]).tolist():
        root = math.sqrt(sum(value * value for value in row) / len(row) + eps)
        expected += [value / root * w for value, w in zip(row, weight.tolist(), strict=True)]
    torch.testing.assert_close(ops.rms_norm(x, weight, eps), torch.tensor(expected).view(shape), rtol=1e-5, atol=1e-6)


def test_rms_norm_gradients(backend: str) -> None:
    expected = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w  # noqa: E731
    check_gradients(lambda x, w: ops.rms_norm(x, w, 1e-5), (torch.randn(3, 4, 16), torch.randn(16)), expected)


def test_rms_norm_of_zeros_and_of_large_values(form: str) -> None:
    """No division by zero, and BF16 inputs whose squares BF16 could not add are normalised in float32."""
    assert torch.equal(ops.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))
    wide = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    out = ops.rms_norm(wide, torch.ones(4096), 1e-6)
    assert out.dtype == torch.bfloat16 and torch.equal(out, torch.ones_like(wide))


# ---- RoPE ----


def angles(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    angle = positions[..., None].float() * 10000.0 ** (-torch.arange(0, dim, 2).float() / dim)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(("lead", "dim"), [((2, 5), 8), ((7,), 2), ((1, 3), 64), ((0,), 4)])
def test_rotate(interleave: bool, lead: tuple[int, ...], dim: int, form: str) -> None:
    """A complex product per pair; first halves first."""
    x = torch.randn(*lead, 3, dim)
    cos, sin = angles(torch.arange(math.prod(lead)).view(lead), dim)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else (x[..., : dim // 2], x[..., dim // 2 :])
    turned = torch.complex(first, second) * torch.complex(cos, sin)[..., None, :]
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(ops.rotate(x, cos, sin, interleave), expected, rtol=1e-5, atol=1e-6)


def test_rotate_broadcasts_over_the_batch(form: str) -> None:
    x = torch.randn(3, 5, 2, 8)
    cos, sin = angles(torch.arange(5)[None], 8)
    whole = ops.rotate(x, cos, sin, True)
    for row in range(3):
        torch.testing.assert_close(whole[row], ops.rotate(x[row], cos[0], sin[0], True), rtol=0, atol=1e-7)


@given(st.integers(0, 2**31), st.booleans(), st.integers(0, 5000), st.integers(0, 5000), st.integers(-100, 100))
def test_rotation_keeps_lengths_and_sees_only_distance(seed: int, interleave: bool, m: int, n: int, by: int) -> None:
    """|R_m x| = |x|, and q_m · k_n = q_(m+d) · k_(n+d)."""
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(seed))

    def at(x: Tensor, position: int) -> Tensor:
        return ops.rotate(x, *angles(torch.tensor([position]), 16), interleave).flatten()

    torch.testing.assert_close(at(q, m).norm(), q.norm(), rtol=1e-5, atol=1e-5)
    here, there = at(q, m) @ at(k, n), at(q, m + by) @ at(k, n + by)
    torch.testing.assert_close(here, there, rtol=0, atol=2e-2)  # angles of thousands of radians are rounded
    near = at(q, m % 10) @ at(k, n % 10), at(q, m % 10 + 7) @ at(k, n % 10 + 7)
    torch.testing.assert_close(*near, rtol=0, atol=3e-5)


@pytest.mark.parametrize("interleave", [True, False])
def test_rotate_gradient_is_the_inverse_rotation(interleave: bool, backend: str) -> None:
    x = torch.randn(5, 3, 8, requires_grad=True)
    cos, sin = angles(torch.arange(5), 8)
    out = ops.rotate(x, cos, sin, interleave)
    out.backward(out.detach())
    torch.testing.assert_close(x.grad, x.detach(), rtol=1e-5, atol=1e-6)


# ---- SwiGLU ----


@pytest.mark.parametrize("shape", [(3,), (2, 5, 17), (0, 4)])
def test_swiglu(shape: tuple[int, ...], form: str) -> None:
    gate, up = 10 * torch.randn(shape), torch.randn(shape)
    expected = [g / (1 + math.exp(-g)) * u for g, u in zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)]
    torch.testing.assert_close(ops.swiglu(gate, up), torch.tensor(expected).view(shape), rtol=1e-5, atol=1e-6)


def test_swiglu_far_out(form: str) -> None:
    """Where exp overflows, silu is 0 or the identity, not NaN."""
    far = torch.tensor([-1e4, 1e4, -100.0])
    torch.testing.assert_close(ops.swiglu(far, torch.ones(3)), torch.tensor([0.0, 1e4, 0.0]))


def test_swiglu_gradients(backend: str) -> None:
    check_gradients(ops.swiglu, (torch.randn(4, 9), torch.randn(4, 9)), lambda g, u: g * torch.sigmoid(g) * u)


# ---- linears ----


@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 8), (0, 8), (5, 1, 2, 8)])
def test_linear(shape: tuple[int, ...], form: str) -> None:
    x, weight = torch.randn(shape), torch.randn(11, 8)
    torch.testing.assert_close(ops.linear(x, weight), torch.einsum("...i,oi->...o", x, weight), rtol=1e-5, atol=1e-5)


def test_linear_casts_the_weight_to_the_activations(backend: str) -> None:
    """Master weights stay float32 under BF16 activations, and so do their gradients."""
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(6, 8, requires_grad=True)
    out = ops.linear(x, weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, x @ weight.bfloat16().T, rtol=2e-2, atol=2e-2)
    out.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, x.float().sum(0).expand(6, 8), rtol=2e-2, atol=2e-2)


def test_linear_gradients(backend: str) -> None:
    check_gradients(ops.linear, (torch.randn(2, 3, 8), torch.randn(5, 8)), lambda x, w: x @ w.T)


@pytest.mark.parametrize("rows", [1, 4])
def test_head_linear(rows: int, form: str) -> None:
    x, weight = torch.randn(rows, 3, 5), torch.randn(3, 5, 7)
    expected = torch.stack([x[:, head] @ weight[head] for head in range(3)], 1)
    torch.testing.assert_close(ops.head_linear(x, weight), expected, rtol=1e-5, atol=1e-5)
    turned = torch.randn(3, 7, 5).transpose(1, 2)  # as W_UV comes
    expected = torch.stack([x[:, head] @ turned[head] for head in range(3)], 1)
    torch.testing.assert_close(ops.head_linear(x, turned), expected, rtol=1e-5, atol=1e-5)


# ---- FP8 blocks ----

SHAPES = [(1, 1), (128, 128), (129, 127), (576, 200), (5, 384), (200, 300)]


def blocks(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Every one of the 256 codes (as far as there is room) and a scale per block."""
    codes = torch.arange(rows * columns).remainder(256).to(torch.uint8).view(rows, columns)
    scales = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
    return codes.view(torch.float8_e4m3fn), scales


def e4m3(code: int) -> float:
    """A code's value from its bits: sign, 4 of exponent with bias 7, 3 of mantissa; 0x7f and 0xff are NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_dequantize_blocks(rows: int, columns: int) -> None:
    """w = q · scale, block by block, shapes that 128 does not divide included, subnormals and NaN included."""
    weight, scales = blocks(rows, columns)
    values = torch.tensor([e4m3(code) for code in weight.view(torch.uint8).flatten().tolist()]).view(rows, columns)
    expected = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            expected[block] = values[block] * scales[i, j]
    out = ops.dequantize_blocks(weight, scales)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    narrow = ops.dequantize_blocks(weight, scales, torch.bfloat16)
    torch.testing.assert_close(narrow, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_dequantize_stacked_experts() -> None:
    weight, scales = zip(*(blocks(130, 140) for _ in range(3)), strict=True)
    out = ops.dequantize_blocks(torch.stack(weight), torch.stack(scales))
    for expert in range(3):
        alone = ops.dequantize_blocks(weight[expert], scales[expert])
        torch.testing.assert_close(out[expert], alone, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_linear_over_fp8_blocks(rows: int, columns: int, form: str) -> None:
    weight = (3 * torch.randn(rows, columns)).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
    x = torch.randn(3, columns)
    expected = F.linear(x, ops.dequantize_blocks(weight, scales))
    stored = ops.QuantizedWeight(weight, scales, ops.FP8_BLOCKS)
    torch.testing.assert_close(ops.linear(x, stored), expected, rtol=1e-4, atol=1e-4 * columns**0.5)
