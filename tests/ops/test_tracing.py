"""Compilers, exporters and transforms meet our ops: right numbers or a Python error, and the interpreter lives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from leanseek.config import ModelConfig
from leanseek.model import Transformer
from tests.small import NETWORK

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

SMALL = NETWORK | {
    "vocab_size": 64,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.1,
}
GQA = {"attention": "gqa", "num_key_value_heads": 1}
TOKENS = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))


def make(**changes: object) -> Transformer:
    torch.set_num_threads(1)
    return Transformer(ModelConfig.from_dict(SMALL | changes)).init_weights(0)


def gradients(model: Transformer, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compiled(model: Transformer) -> Tensor:
    return torch.compile(model, backend="aot_eager", fullgraph=True)(TOKENS)


def exported(model: Transformer) -> Tensor:
    return torch.export.export(model, (TOKENS,)).module()(TOKENS)


def traced(mode: str) -> Callable[[Transformer], Tensor]:
    return lambda model: make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(TOKENS)(TOKENS)


def jit(model: Transformer) -> Tensor:
    """Traced on other tokens: what a kernel computed must not have become a constant."""
    return torch.jit.trace(model, TOKENS.flip(1), check_trace=False)(TOKENS)


def under_another_device(model: Transformer) -> Tensor:
    with torch.device("meta"):
        return model(TOKENS)


WAYS: dict[str, Callable[[Transformer], Tensor]] = {
    "export": exported,
    "make_fx real": traced("real"),
    "make_fx fake": traced("fake"),
    "functionalize": lambda model: torch.func.functionalize(model)(TOKENS),
    "functional_call": lambda model: torch.func.functional_call(model, dict(model.named_parameters()), (TOKENS,)),
    "vmap": lambda model: torch.vmap(lambda row: model(row[None])[0])(TOKENS),
    "another device": under_another_device,
    "deepcopy": lambda model: copy.deepcopy(model)(TOKENS),
}


@pytest.mark.parametrize("way", WAYS)
def test_numbers_are_ours_whoever_calls(way: str) -> None:
    model = make()
    torch.testing.assert_close(WAYS[way](model), model(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["export", "vmap"])
def test_numbers_of_the_baseline_too(way: str) -> None:
    model = make(**GQA)
    torch.testing.assert_close(WAYS[way](model), model(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_jit_trace_holds_no_constants() -> None:
    model = make(n_routed_experts=0).requires_grad_(False)
    torch.testing.assert_close(jit(model), model(TOKENS), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_trains_as_ours_does() -> None:
    """In one graph, without breaks."""
    model = make()
    logits = compiled(model)
    torch.testing.assert_close(logits, model(TOKENS), rtol=1e-4, atol=1e-5)
    found, expected = gradients(model, logits), gradients(model, model(TOKENS))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_functional_gradients_are_ours() -> None:
    model = make()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (TOKENS,)).square().mean()

    found, expected = torch.func.grad(loss)(dict(model.named_parameters())), gradients(model, model(TOKENS))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_ensemble_runs_as_one() -> None:
    models = [make(), make().init_weights(9)]
    parameters, buffers = torch.func.stack_module_state(models)
    out = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (TOKENS,)))(parameters, buffers)
    for row, model in zip(out, models, strict=True):
        torch.testing.assert_close(row, model(TOKENS), rtol=1e-4, atol=1e-5)


def test_shapes_without_memory() -> None:
    model = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(TOKENS).shape == (2, 10, 64)
        assert make()(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 64)
    assert copy.deepcopy(model).to("meta")(TOKENS.to("meta")).shape == (2, 10, 64)


def test_a_backward_without_memory_is_a_python_error_where_kernels_ran() -> None:
    loss = make()(TOKENS).sum()
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            loss.backward()
        except RuntimeError as error:
            assert "native kernels read memory" in str(error)
