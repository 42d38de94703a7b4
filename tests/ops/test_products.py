"""Products of a dtype that the CPU does not multiply: widened to float32 in every torch path, and rounded once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from leanseek import ops
from leanseek.machine.device import NARROW
from leanseek.model import Transformer
from leanseek.ops import products
from tests.conftest import into_fp8_blocks

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "_linear_pointwise", "dot", "mv", "_scaled_dot_product")


class NoNarrowProduct(TorchDispatchMode):
    """Refuses what an AVX2 CPU refuses, or takes minutes for: a product of BF16 or float16 operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith(PRODUCTS):
            self.seen += 1
            assert not any(isinstance(a, Tensor) and a.dtype in NARROW for a in args), func
        return func(*args, **kwargs or {})


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoNarrowProduct]:
    """A CPU without narrow products, and no kernels."""
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype not in NARROW)
    with ops.use("torch"), NoNarrowProduct() as mode:
        yield mode
    assert mode.seen


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("row_invariant", [False, True])
def test_the_result_is_rounded_once(row_invariant: bool, emulated: None) -> None:
    x, weight, heads = bf16(5, 3, 64), bf16(40, 64, seed=1), bf16(3, 64, 16, seed=2)
    with ops.row_invariant() if row_invariant else ops.use("torch"):
        pairs = [
            (ops.linear(x, weight), x.double() @ weight.double().T),
            (ops.head_linear(x, heads), torch.einsum("nhk,hkr->nhr", x.double(), heads.double())),
        ]
    for got, exact in pairs:
        assert got.dtype == torch.bfloat16
        # half a step of BF16's 8 bits, and float32's own error
        assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-5).all()


@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_network_trains(attention: str, dtype: torch.dtype, emulated: None, tiny_model: Callable) -> None:
    """Forward and backward, experts and head included, near the float32 network's gradients."""
    changes = {"attention": attention} if attention == "mla" else {"attention": "gqa", "num_key_value_heads": 2}
    tokens, targets = torch.arange(40).view(2, 20), torch.arange(40) + 1
    gradients = []
    for compute in (dtype, torch.float32):
        model = tiny_model(**changes)
        hidden, _ = model.hidden(tokens, dtype=compute)
        model.head(hidden, targets).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert model.lm_head.weight.grad.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


def step(model: Transformer) -> Tensor:
    """A prefill and two decode steps of two sequences -> logits."""
    cache = torch.zeros(
        model.config.num_hidden_layers, 32, model.config.cache_width, dtype=model.embed_tokens.weight.dtype
    )
    pages, found = torch.arange(8).view(2, 4), []
    for first, last in ((0, 6), (6, 7), (7, 8)):
        n = last - first
        positions = torch.arange(first, last).repeat(2)
        slots = positions + torch.tensor([0, 16]).repeat_interleave(n)
        index = ops.CacheIndex(positions, slots, torch.tensor([0, n, 2 * n]), torch.tensor([last, last]), pages, 4)
        found.append(model.head(model.step(positions + 3, cache, index)).float())
    return torch.cat(found)


@pytest.mark.parametrize("row_invariant", [False, True])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "fp8"])
@pytest.mark.parametrize("attention", ["mla", "gqa"])
@torch.no_grad()
def test_a_network_serves(
    attention: str, stored: str, row_invariant: bool, emulated: None, tiny_model: Callable
) -> None:
    changes = {} if attention == "mla" else {"attention": "gqa", "num_key_value_heads": 2}
    # every expert is chosen, so that no rounding changes the choice
    model = tiny_model(n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1, **changes)
    exact = step(model)
    model.to(torch.bfloat16 if stored == "fp8" else getattr(torch, stored))
    if stored == "fp8":
        into_fp8_blocks(model)
    with ops.row_invariant() if row_invariant else ops.use("torch"):
        got = step(model)
    error = (got - exact).abs().mean() / exact.abs().mean()
    assert error < (0.15 if stored == "fp8" else 0.03)


def test_what_onednn_may_not_do_is_found_out() -> None:
    """ONEDNN_MAX_CPU_ISA hides BF16 from oneDNN on CPUs that have it; the answer shows in the dtype to train in."""
    program = (
        "import torch; from leanseek import ops; from leanseek.machine import device\n"
        "x, w = torch.ones(3, 256).bfloat16(), torch.ones(8, 256).bfloat16()\n"
        "with ops.row_invariant(): assert (ops.linear(x, w) == 256).all()\n"
        "print(device.multiplies(torch.bfloat16), device.multiplies(torch.float32), device.preferred_dtype('cpu'))"
    )
    confined = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "LEANSEEK_CPU": "none"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | confined, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "torch.float32"]
