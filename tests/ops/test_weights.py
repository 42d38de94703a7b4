"""Quantised weights: what a format means, and that they go where their module goes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from leanseek import ops
from leanseek.model import Transformer
from leanseek.ops.weights import FORMATS, WeightFormat, named_weights, replace_weight
from tests.conftest import dequantized, into_fp8_blocks


def weight(format: WeightFormat, *shape: int) -> ops.QuantizedWeight:
    data = torch.randint(0, 0x7F, shape, dtype=torch.uint8).view(format.dtype)
    return ops.QuantizedWeight(data, torch.rand(format.scale_shape(shape)) + 0.1, format)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_format_by_hand(format: WeightFormat) -> None:
    w = weight(format, 150, 130)
    i, j = 140, 129
    scale = w.scale[1, 1] if format == ops.FP8_BLOCKS else w.scale[i]
    assert w.shape == (150, 130)
    assert w.dense(torch.float32)[i, j] == w.data[i, j].float() * scale
    assert torch.equal(w.dense(torch.bfloat16), w.dense(torch.float32).bfloat16())
    x = torch.randn(3, 130)
    torch.testing.assert_close(ops.linear(x, w), x @ w.dense(torch.float32).T)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_one_of_a_stack(format: WeightFormat) -> None:
    stack = weight(format, 3, 140, 130)
    assert torch.equal(stack[2].dense(torch.float32), stack.dense(torch.float32)[2])


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_what_is_not_of_the_format_is_refused(format: WeightFormat) -> None:
    good = weight(format, 150, 130)
    for data, scale in ((good.data, good.scale[:-1]), (good.data.float(), good.scale), (good.data[None], good.scale)):
        with pytest.raises(ValueError, match=f"is not a weight in {format.name}"):
            ops.QuantizedWeight(data, scale, format)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "double"])
def test_casts_leave_it_and_moves_take_it(cast: str, tiny_model: Callable[..., Transformer]) -> None:
    model = into_fp8_blocks(tiny_model())
    before = {n: w.dense(torch.float32) for n, w in named_weights(model).items() if isinstance(w, ops.QuantizedWeight)}
    getattr(model, cast)()
    after = {n: w.dense(torch.float32) for n, w in named_weights(model).items() if isinstance(w, ops.QuantizedWeight)}
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.embed_tokens.weight.dtype != torch.float8_e4m3fn
    assert {t.device.type for t in model.to("meta").state_dict().values()} == {"meta"}


def test_copies_and_state_dicts(tiny_model: Callable[..., Transformer], tiny_tokens: torch.Tensor) -> None:
    """A copy has memory of its own, and a state dict goes into a model of the same forms."""
    model = into_fp8_blocks(tiny_model())
    twin, other = copy.deepcopy(model), into_fp8_blocks(tiny_model(initializer_range=0.1))
    expected = model(tiny_tokens)
    other.load_state_dict(model.state_dict())
    for inner in (m for m in model.modules() if isinstance(m, ops.QuantizedWeight)):
        inner.data.zero_()
    assert torch.equal(twin(tiny_tokens), expected) and torch.equal(other(tiny_tokens), expected)
    assert not torch.equal(model(tiny_tokens), expected)
    torch.testing.assert_close(dequantized(twin)(tiny_tokens), expected, atol=1e-4, rtol=1e-4)


def test_no_kernel_reads_a_weight_without_memory() -> None:
    w = weight(ops.FP8_BLOCKS, 20, 30)
    assert ops.ordinary(w) and not ops.ordinary(copy.deepcopy(w).to("meta"))


def test_it_takes_the_place_of_a_parameter(tiny_model: Callable[..., Transformer]) -> None:
    linear = tiny_model().layers[0].self_attn.o_proj
    replace_weight(linear, "weight", ops.quantize_rows(linear.weight.detach()))
    assert not list(linear.parameters()) and set(linear.state_dict()) == {"weight.data", "weight.scale"}
