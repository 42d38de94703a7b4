"""The native kernels against torch, bit for bit: rounding leaves no room for "close"."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from leanseek import ops
from leanseek.native import usable_variants, use_variant
from leanseek.ops import quantize as q
from leanseek.ops.operands import Activation, Coded, Kept

if not usable_variants():
    pytest.skip("no native kernels", allow_module_level=True)

SHAPES = [(1, 1), (5, 127), (130, 128), (200, 300)]


@pytest.fixture(params=usable_variants(), autouse=True)
def variant(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_variant(request.param):
        yield


def hard(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, zeros, subnormals and values that are not finite."""
    x = torch.randn(rows, columns) * torch.randn(rows, 1).mul(8).exp()
    x[rows // 2] = 0
    x[rows // 3] *= 1e-38
    x[0, 0], x[-1, -1] = float("nan"), -float("inf")
    return x.to(dtype)


def groups_of(*ends: int) -> ops.Groups:
    return ops.Groups(ends[-1], torch.device("cpu"), torch.tensor(ends, dtype=torch.int32))


def same(fast: Activation, exact: Activation) -> None:
    assert isinstance(fast, Tensor) and isinstance(exact, Coded)
    value = (exact.codes * exact.scale).to(fast.dtype)
    assert torch.equal(fast.isnan(), value.isnan())
    assert torch.equal(fast.nan_to_num(), value.nan_to_num())


def same_kept(fast: Kept, exact: Kept) -> None:
    assert torch.equal(fast.codes.view(torch.uint8) & 0x7F, exact.codes.view(torch.uint8) & 0x7F)
    finite = ~exact.codes.float().isnan()  # torch's NaN keeps a sign
    assert torch.equal(fast.codes.view(torch.uint8)[finite], exact.codes.view(torch.uint8)[finite])
    assert torch.equal(fast.scales, exact.scales)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_turned_and_blocks(shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> None:
    x = hard(*shape, dtype)
    index = torch.randint(0, shape[0], (shape[0] + 3,))
    groups = groups_of(2, 2, shape[0] + 3)
    operand, kept = q.rows(x, power_of_two)
    found = (
        operand, q.turn(x, groups, power_of_two, dtype, index), q.turn(kept, groups, power_of_two, dtype, index),
        *q.both(x, groups_of(shape[0]), power_of_two), q.blocks(x[None], power_of_two, dtype),
    )  # fmt: skip
    with ops.use("torch"):
        operand, exact = q.rows(x, power_of_two)
        expected = (
            operand, q.turn(x, groups, power_of_two, dtype, index), q.turn(exact, groups, power_of_two, dtype, index),
            *q.both(x, groups_of(shape[0]), power_of_two), q.blocks(x[None], power_of_two, dtype),
        )  # fmt: skip
    same_kept(kept, exact)
    for a, b in zip(found, expected, strict=True):
        same(a, b)


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_in_blocks(shape: tuple[int, int], dtype: torch.dtype, halves: int) -> None:
    x, groups = hard(shape[0], shape[1] * halves, dtype), groups_of(shape[0] // 3, shape[0] // 3, shape[0])
    found = q.both_blocks(x, groups, torch.bfloat16, halves)
    with ops.use("torch"):
        expected = q.both_blocks(x, groups, torch.bfloat16, halves)
    same(found.rows, expected.rows)
    same(found.turned, expected.turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_read(dtype: torch.dtype) -> None:
    """Also of rows that are parts of longer ones."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).expand(3, 256).contiguous().view(torch.float8_e4m3fn)
    kept = Kept(codes[:, :200], torch.tensor([[1.0, 2.0**-126], [2.0**100, 3.0], [0.5, 2.0**-20]]))
    found = q.wide(kept, dtype)
    with ops.use("torch"):
        expected = q.wide(kept, dtype)
    assert found.dtype == dtype and torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("shape", SHAPES)
def test_stored_blocks_and_e5m6(shape: tuple[int, int]) -> None:
    x = hard(*shape, torch.float32)
    codes, scales = q.quantize_blocks(x)
    rounded = q.round_e5m6(x.bfloat16())
    with ops.use("torch"):
        same_kept(Kept(codes, scales), Kept(*q.quantize_blocks(x)))
        assert torch.equal(rounded.nan_to_num(), q.round_e5m6(x.bfloat16()).nan_to_num())


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("size", [20, 128, 200])
def test_swiglu_forward_and_backward(size: int, weighted: bool) -> None:
    """The exponential differs by a few last bits: a value may fall on the other side of a rounding, rarely."""
    hidden, grad = torch.randn(150, 2 * size).bfloat16(), torch.randn(150, size).bfloat16()
    weight = torch.rand(150) if weighted else None
    groups = groups_of(100, 100, 150)
    act, kept = q.swiglu(hidden, weight, True)
    back = q.swiglu_backward(grad, kept, weight, groups, True)
    with ops.use("torch"):
        exact_act, exact_kept = q.swiglu(hidden, weight, True)
        exact = q.swiglu_backward(grad, kept, weight, groups, True)
    same_kept(kept, exact_kept)
    for a, b in ((act, exact_act), (back.hidden.rows, exact.hidden.rows), (back.hidden.turned, exact.hidden.turned),
                 (back.act, exact.act)):  # fmt: skip
        assert isinstance(a, Tensor) and isinstance(b, Coded)
        value = b.codes * b.scale
        assert float((a.float() != value).float().mean()) < 1e-3
        assert torch.allclose(a.float(), value, rtol=2**-3, atol=float(b.scale.max()) * 2**-9)  # one step of E4M3
    if weighted:
        assert back.weight is not None and exact.weight is not None
        assert torch.allclose(back.weight, exact.weight, rtol=1e-5, atol=1e-5)
