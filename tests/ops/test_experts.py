"""The routed experts against a loop over tokens: values, gradients, and the shapes in which some expert has nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leanseek import ops
from leanseek.ops.experts import combine_rows


def loop(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One token, one choice at a time."""
    rows = []
    for token in range(x.shape[0]):
        row = torch.zeros(x.shape[1], dtype=x.dtype)
        for choice, expert in enumerate(indices[token].tolist()):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            row = row + weights[token, choice] * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(row)
    return torch.stack(rows) if rows else x.clone()


def problem(n: int, experts: int, k: int, width: int, size: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    choices = [torch.randperm(experts, generator=generator)[:k] for _ in range(n)]
    indices = torch.stack(choices) if n else torch.zeros(0, k, dtype=torch.int64)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    gate_up, down = draw(experts, 2 * size, width) / width**0.5, draw(experts, width, size) / size**0.5
    return draw(n, width), indices, draw(n, k).abs() + 0.1, gate_up, down


SHAPES = [
    (1, 8, 2, 16, 12), (1, 8, 8, 16, 12), (5, 8, 2, 16, 12), (40, 4, 2, 32, 20), (3, 16, 1, 8, 4), (0, 4, 2, 16, 8),
    (6, 1, 1, 16, 8), (7, 4, 2, 25, 7),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: tuple[int, ...], form: str) -> None:
    inputs = problem(*shape)
    out = ops.experts(*inputs)
    assert out.shape == inputs[0].shape
    torch.testing.assert_close(out, loop(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: tuple[int, ...], backend: str) -> None:
    """Of tokens, gate values and both weights; an expert that nobody chose has zeros, not NaN and not None."""
    x, indices, weights, gate_up, down = problem(*shape)
    probe = torch.randn_like(x)
    gradients = []
    for function in (ops.experts, loop):
        leaves = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
        out = function(leaves[0], indices, *leaves[1:])
        (out * probe).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        expected = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    unused = [expert for expert in range(gate_up.shape[0]) if expert not in indices]
    for gradient in gradients[0][2:]:
        assert (gradient[unused] == 0).all()


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 6), st.integers(1, 6))
def test_any_shape(seed: int, n: int, experts: int, k: int) -> None:
    inputs = problem(n, experts, min(k, experts), 8, 4, seed)
    with ops.use("torch"):
        torch.testing.assert_close(ops.experts(*inputs), loop(*inputs), rtol=1e-4, atol=1e-5)


def test_gradcheck() -> None:
    """The hand-written backward is the derivative: finite differences in float64."""
    x, indices, weights, gate_up, down = problem(3, 4, 2, 6, 3)
    leaves = [t.double().requires_grad_() for t in (x, weights, gate_up, down)]
    with ops.use("torch"):
        function = lambda x, w, g, d: ops.experts(x, indices, w, g, d)  # noqa: E731
        assert torch.autograd.gradcheck(function, leaves, atol=1e-4, rtol=1e-3, nondet_tol=0)


def test_same_expert_for_all(form: str) -> None:
    """The worst imbalance drops nothing."""
    x, _, weights, gate_up, down = problem(30, 8, 2, 16, 12)
    indices = torch.tensor([[5, 2]]).expand(30, 2)
    expected = loop(x, indices, weights, gate_up, down)
    torch.testing.assert_close(ops.experts(x, indices, weights, gate_up, down), expected, rtol=1e-4, atol=1e-5)


def test_bf16_activations_over_float32_weights(backend: str) -> None:
    x, indices, weights, gate_up, down = problem(12, 8, 2, 32, 16)
    out = ops.experts(x.bfloat16(), indices, weights, gate_up, down)
    expected = loop(x, indices, weights, gate_up, down)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("n", [1, 9])
def test_fp8_blocks(n: int, form: str) -> None:
    """Experts kept as FP8 blocks compute what their dequantised weights do, sizes that 128 does not divide included."""
    width, size, experts = 160, 72, 4
    x, indices, weights, gate_up, down = problem(n, experts, 2, width, size)
    both = [
        ops.QuantizedWeight((t * 8).to(torch.float8_e4m3fn), torch.rand(shape) * 0.2 + 0.05, ops.FP8_BLOCKS)
        for t, shape in ((gate_up, (experts, 2, 2)), (down, (experts, 2, 1)))
    ]
    out = ops.experts(x, indices, weights, *both)
    dense = (w.dense(torch.float32) for w in both)
    torch.testing.assert_close(out, loop(x, indices, weights, *dense), rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**31), st.integers(0, 20), st.integers(1, 6), st.integers(1, 4))
def test_route_order(seed: int, n: int, experts: int, k: int) -> None:
    """A stable sort by expert, its inverse, and where each expert's pairs end."""
    indices = torch.randint(0, experts, (n, k), generator=torch.Generator().manual_seed(seed))
    order, place, ends = ops.route_order(indices, experts)
    flat = indices.flatten().tolist()
    assert order.tolist() == sorted(range(n * k), key=lambda pair: (flat[pair], pair))
    assert order[place].tolist() == list(range(n * k))
    assert ends.dtype == torch.int32
    assert ends.tolist() == [sum(e <= expert for e in flat) for expert in range(experts)]


class Exchange(torch.autograd.Function):
    """An all-to-all among one rank: rows go out and come back as they are, forward and backward."""

    @staticmethod
    def forward(ctx, rows):  # type: ignore[no-untyped-def]
        return rows.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 4, 2, 32, 20), (1, 8, 2, 16, 12), (0, 4, 2, 16, 8)])
def test_an_exchange_between_the_steps_leaves_every_bit(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    x, indices, *others = problem(*shape)
    probe, found = torch.randn_like(x).to(dtype), []
    for exchange in (None, Exchange.apply):
        leaves = [t.clone().requires_grad_() for t in (x.to(dtype), *others)]
        sent = ops.expert_dispatch(leaves[0], indices, leaves[1], shape[1])
        if exchange is None:
            rows = ops.expert_products(sent, *leaves[2:])
        else:
            out = sent.gathered()
            came = ops.Dispatched(exchange(out.x), out.ends, exchange(out.weights))
            rows = exchange(ops.expert_products(came, *leaves[2:]))
        out = ops.expert_combine(rows, sent)
        out.backward(probe)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_no_copy_of_the_weights_is_kept_for_backward(master: torch.dtype, backend: str) -> None:
    """Nor rows gathered from x: kept are x, the weights themselves and the pre-activation."""
    x, indices, weights, gate_up, down = problem(12, 8, 3, 32, 16)
    leaves = [x.bfloat16(), weights, gate_up.to(master), down.to(master)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.experts(leaves[0].requires_grad_(), indices, *(t.requires_grad_() for t in leaves[1:]))
    own = {t.data_ptr() for t in leaves}
    assert own <= {t.data_ptr() for t in kept} | {weights.data_ptr()}
    wide = [t for t in kept if t.data_ptr() not in own and t.is_floating_point() and t.ndim > 1]
    assert [t.shape for t in wide] == [(36, 32)]  # [N·K, 2I]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_choice_without_a_row_adds_nothing(dtype: torch.dtype, form: str) -> None:
    """Also where there are no rows at all, beside rows that are not finite, and of rows that are parts of longer ones."""
    rows = torch.randn(5, 70).to(dtype)
    rows[3] = torch.nan
    place = torch.tensor([[0, -1, 2], [-1, -1, -1], [4, 1, 0], [-1, 3, -1]])
    found = combine_rows(rows[:, 3:67], place.flatten(), 4)
    expected = torch.stack([rows[[r for r in mine if r >= 0], 3:67].float().sum(0) for mine in place.tolist()])
    torch.testing.assert_close(found, expected.to(dtype), equal_nan=True)
    none = combine_rows(rows[:0], torch.full((6,), -1), 2)
    assert none.shape == (2, 70) and none.dtype == dtype and not none.any()


@pytest.mark.parametrize("rows", [0, 3, 11])
def test_experts_elsewhere_have_no_rows_here(rows: int, backend: str) -> None:
    """Choices of other experts leave no trace in the sum and in the gradients."""
    x, indices, weights, gate_up, down = problem(6, 8, 2, 16, 12)
    here = indices.flatten().sort().values[rows] if rows < 12 else 8  # the experts before it are here
    rows, n = int((indices < here).sum()), int(here)
    local = indices.where(indices < n, n)
    leaves = [t.clone().requires_grad_() for t in (x, weights, gate_up[:n], down[:n])]
    sent = ops.expert_dispatch(leaves[0], local, leaves[1], n, rows)
    assert sent.weights.shape == (rows,) and sent.ends.tolist()[-1:] == ([rows] if n else [])
    out = ops.expert_combine(ops.expert_products(sent, *leaves[2:]), sent)
    expected = loop(x, indices, weights * (indices < n), gate_up, down)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    whole = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
    loop(whole[0], indices, whole[1] * (indices < n), *whole[2:]).sum().backward()
    for ours, theirs in zip(leaves, whole, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad[: len(ours)], rtol=1e-4, atol=1e-4)
