"""A training step's Triton kernels that are no products, against the torch references: on a GPU as compiled, elsewhere by
Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leanseek import ops
from leanseek.gpu.training import _attends as attends
from leanseek.ops.experts import combine_rows

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanseek.gpu.device.refusal", lambda device: "")


def run(function: Callable[..., Tensor], backend: str, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.to(DEVICE, copy=True).requires_grad_(t.is_floating_point()) for t in inputs]
    with ops.use(backend):
        out = function(*leaves)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out))
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


def agree(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Within a step of BF16 of the largest value; float32 within sums in another order."""
    found, expected = run(function, "gpu", *inputs), run(function, "torch", *inputs)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        step = 2**-7 if a.dtype == torch.bfloat16 or inputs[0].dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a, b, rtol=step, atol=step * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7, 100), (1030, 64)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    agree(lambda x, w: ops.rms_norm(x, w, 1e-6), torch.randn(shape).to(dtype), torch.rand(shape[-1]) + 0.5)


def test_rms_norm_of_a_part_of_a_row() -> None:
    """The latent is a slice of what one product writes."""
    agree(lambda x, w: ops.rms_norm(x[..., :40], w, 1e-6), torch.randn(5, 56).bfloat16(), torch.rand(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    agree(ops.swiglu, *torch.randn(2, 3, 5, 1100).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, 1], [0, 3], [4, 0]])[torch.randint(0, 3, (30,))]
    agree(
        lambda x, w, up, down: ops.experts(x, indices.to(DEVICE), w, up, down),
        torch.randn(30, 48).to(dtype), torch.rand(30, 2), torch.randn(6, 80, 48) * 0.2, torch.randn(6, 48, 40) * 0.2,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_over_more_columns_than_a_block(dtype: torch.dtype) -> None:
    there = torch.tensor([0, 1, 4999, 1, 4096, 1, 17, 1, 4095], device=DEVICE)  # every other one: not contiguous
    hidden, weight = torch.randn(5, 24).to(dtype), torch.randn(5000, 24)
    agree(lambda x, w: ops.linear_cross_entropy(x, w, there[::2]), hidden, weight)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(("heads", "nope", "rope", "v"), [(3, 12, 8, 20), (20, 16, 16, 8)])
def test_heads_are_placed_and_their_gradients_gathered(
    heads: int, nope: int, rope: int, v: int, interleave: bool
) -> None:
    """eq. 3, 4, 8, 9 and back again; k_R is a slice of what one product writes, and angles differ by sequence."""
    from leanseek.gpu.attention import gather_gradients, place_heads

    batch, length = 2, 5
    q = torch.randn(batch, length, heads, nope + rope, device=DEVICE, requires_grad=True)
    kv = torch.randn(batch, length, heads, nope + v, device=DEVICE, requires_grad=True)
    latent = torch.randn(batch, length, 7 + rope, device=DEVICE, requires_grad=True)
    angles = torch.rand(batch, length, rope // 2, device=DEVICE) * 6
    turn = angles.cos(), angles.sin()
    k_rope = latent[..., 7:]
    query = torch.cat((q[..., :nope], ops.rotate.reference(q[..., nope:], *turn, interleave)), -1)
    shared = ops.rotate.reference(k_rope.unsqueeze(-2), *turn, interleave).expand(-1, -1, heads, -1)
    key = torch.cat((kv[..., :nope], shared), -1)
    found = place_heads(q.detach(), kv.detach(), k_rope.detach(), *turn, interleave)
    torch.testing.assert_close(found, (query, key), rtol=1e-6, atol=1e-6)
    grads = [torch.randn_like(t) for t in (query, key, kv[..., nope:])]
    torch.autograd.backward((query, key, kv[..., nope:]), grads)
    dq, dkv, dk_rope = gather_gradients(*(g.clone() for g in grads), *turn, interleave)
    assert latent.grad is not None
    torch.testing.assert_close((dq, dkv, dk_rope), (q.grad, kv.grad, latent.grad[..., 7:]), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 300])
def test_mla_attention_on_cudnn(length: int) -> None:
    q, kv, latent = (torch.randn(2, length, *rest) for rest in ((4, 192), (4, 256), (80,)))
    angles = torch.rand(1, length, 32, device=DEVICE) * 6
    ran: list[bool] = []

    def attention(q: Tensor, kv: Tensor, latent: Tensor) -> Tensor:
        inputs = q, kv, latent[..., 16:], angles.cos(), angles.sin()
        ran.append(attends(*inputs))
        return ops.mla_attention(*inputs, 192**-0.5, True)

    agree(attention, q.bfloat16(), kv.bfloat16(), latent.bfloat16())
    assert ran[0] == (length > 1)


def test_adamw_is_torchs_in_float32_rounded_once() -> None:
    rule = ops.AdamW(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    ours, theirs = ([torch.randn(37, 70, generator=torch.Generator().manual_seed(1)).to(DEVICE)] for _ in range(2))
    for state in (ours, theirs):
        state += [torch.zeros(37, 70, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
        state += [torch.zeros((), device=DEVICE)]
    for step in range(3):
        grad = torch.randn(37, 70, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        for backend, (weight, m, v, count) in (("gpu", ours), ("torch", theirs)):
            with ops.use(backend):
                ops.adamw(weight, grad, m, v, count, rule)
    assert int(ours[3]) == 3
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(ours[1:3], theirs[1:3], strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_choice_without_a_row_adds_nothing(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 1100).to(dtype)
    rows[3] = torch.nan
    rows, place = rows.to(DEVICE)[:, 4:1094], torch.tensor([0, -1, 2, -1, -1, -1, 4, 1, 0], device=DEVICE)
    found = []
    for backend in ("gpu", "torch"):
        with ops.use(backend):
            found.append(combine_rows(rows, place, 3))
    torch.testing.assert_close(*found)
