"""A step over packed panels, one native call, computes what the torch model computes op by op."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from leanseek import native, ops
from leanseek.backends import PanelBackend, StepBackend, TorchBackend, backend_of, refusal
from leanseek.backends.panels import HEAD
from leanseek.config import ModelConfig
from leanseek.model import Transformer
from leanseek.ops.weights import WeightFormat, named_weights, replace_weight
from tests.conftest import TINY, dequantized, into_fp8_blocks

pytestmark = pytest.mark.skipif(not native.usable_variants(), reason=f"no kernels here: {native.status().detail}")

NETWORKS: dict[str, dict[str, Any]] = {
    "v3": {},
    "no q_lora": {"q_lora_rank": None},
    "halves": {"rope_interleave": False},
    "no shared experts": {"n_shared_experts": 0},
    "softmax": {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "wide": {
        "hidden_size": 256,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "moe_intermediate_size": 128,
    },
}


def model_of(changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Transformer:
    config = ModelConfig.from_dict(TINY | changes)
    model = Transformer(config).init_weights(0)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()))
    return model.to(dtype)


def packed(model: Transformer) -> PanelBackend:
    weights = named_weights(model)
    assert not refusal(model.config, weights)
    return PanelBackend(model.config, weights)


def steps(backend: StepBackend, counts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of several sequences' new tokens -> all hidden states, and the cache."""
    c, page, per = backend.config, 4, 8
    cache = torch.zeros(c.num_hidden_layers, 3 * page * per, c.cache_width, dtype=backend.dtype)
    pages = torch.randperm(3 * per, generator=torch.Generator().manual_seed(1)).view(3, per)
    done, found = [0, 0, 0], []
    for new in counts:
        positions = torch.cat([torch.arange(d, d + n) for d, n in zip(done, new, strict=True)])
        owner = torch.repeat_interleave(torch.arange(3), torch.tensor(new))
        slots = pages[owner, positions // page] * page + positions % page
        offsets = torch.tensor([0, *itertools.accumulate(new)])
        done = [d + n for d, n in zip(done, new, strict=True)]
        index = ops.CacheIndex(positions, slots, offsets, torch.tensor(done), pages, page)
        tokens = torch.randint(0, c.vocab_size, positions.shape, generator=torch.Generator().manual_seed(len(found)))
        found.append(backend.step(tokens, cache, index))
    return torch.cat(found), cache


COUNTS = [[5, 12, 1], [1, 1, 1], [3, 1, 7]]


@pytest.mark.parametrize("variant", native.usable_variants())
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_as_op_by_op(name: str, variant: str) -> None:
    model = model_of(NETWORKS[name])
    with native.use_variant(variant):
        expected, cache = steps(TorchBackend(model), COUNTS)
        got, planned_cache = steps(packed(model), COUNTS)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(planned_cache, cache, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", native.usable_variants())
@torch.no_grad()
def test_an_mtp_module_as_op_by_op(variant: str) -> None:
    """Embedding and hidden state joined (eq. 21), with norms that differ; its latents go behind the main network's."""
    model = model_of({"num_nextn_predict_layers": 1})
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    layers, n = model.config.num_hidden_layers, 10
    index = ops.CacheIndex(
        torch.arange(n), torch.arange(n), torch.tensor([0, n]), torch.tensor([n]), torch.arange(4)[None], 4
    )
    tokens = torch.arange(3, 3 + n)

    def run(backend: StepBackend) -> list[torch.Tensor]:
        cache = torch.zeros(layers + 1, 16, model.config.cache_width)
        hidden = backend.step(tokens, cache, index)
        ahead = backend.step_ahead(1, hidden, tokens + 1, cache, index)
        return [hidden, ahead, backend.logits(ahead), cache]

    with native.use_variant(variant):
        expected = run(TorchBackend(model))
        got = run(packed(model))
    assert float(expected[3][layers].abs().max()) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", native.usable_variants())
@torch.no_grad()
def test_nearer_to_float32_than_bf16_op_by_op(variant: str) -> None:
    """In BF16 the planned step rounds less often. Every expert is chosen, so that no rounding changes the choice."""
    changes = NETWORKS["wide"] | {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    model = model_of(changes, torch.bfloat16)
    exact, _ = steps(TorchBackend(model_of(changes, torch.bfloat16).float()), COUNTS)
    with native.use_variant(variant):
        by_op, _ = steps(TorchBackend(model), COUNTS)
        planned, _ = steps(packed(model), COUNTS)
    error = [float((x.float() - exact).square().mean()) for x in (planned, by_op)]
    assert error[0] <= 1.1 * error[1]


@pytest.mark.parametrize("variant", native.usable_variants())
@torch.no_grad()
def test_fp8_blocks_and_an_int8_head(variant: str) -> None:
    """Against the same weights dequantised to float32."""
    model = into_fp8_blocks(model_of(NETWORKS["wide"]), "layers.0.mlp", "layers.1.self_attn", "layers.1.mlp.experts")
    exact = TorchBackend(dequantized(model))
    head = ops.quantize_rows(model.lm_head.weight.data)
    with native.use_variant(variant):
        backend = PanelBackend(model.config, named_weights(model) | {HEAD: head})
        got, _ = steps(backend, COUNTS)
        logits = backend.logits(got)
    expected, _ = steps(exact, COUNTS)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    error = (logits - exact.logits(got)).abs().max() / exact.logits(got).abs().max()
    assert 0 < error < 0.01
    torch.testing.assert_close(logits, TorchBackend(model, head).logits(got), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", native.usable_variants())
@pytest.mark.parametrize("stored", ["fp8", "bfloat16", "float32"])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(stored: str, variant: str) -> None:
    """Bit for bit, experts and attention included: sequences of one token, together and in parts."""
    model = model_of(NETWORKS["wide"], torch.bfloat16 if stored == "bfloat16" else torch.float32)
    if stored == "fp8":
        into_fp8_blocks(model)
    n, tokens = 37, torch.arange(37)

    def run(backend: StepBackend, rows: slice) -> torch.Tensor:
        at = torch.arange(n)[rows]
        index = ops.CacheIndex(
            torch.zeros_like(at), 4 * at, torch.arange(len(at) + 1), torch.ones_like(at), at[:, None], 4
        )
        cache = torch.zeros(model.config.num_hidden_layers, 4 * n, model.config.cache_width, dtype=backend.dtype)
        return backend.step(tokens[rows], cache, index)

    with native.use_variant(variant):
        backend = packed(model)
        whole = run(backend, slice(0, n))
        for rows in (slice(0, 1), slice(3, 5), slice(1, 4), slice(7, 20), slice(30, n)):
            assert torch.equal(run(backend, rows), whole[rows])


def tens(weight: torch.Tensor) -> ops.QuantizedWeight:
    """A format of no kernel: multiples of a tenth, one scale for all."""
    form = WeightFormat("tens", torch.int8, lambda shape: (1,), lambda data, scale, dtype: (data * scale).to(dtype))
    return ops.QuantizedWeight((weight * 10).to(torch.int8), torch.full((1,), 0.1), form)


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Transformer], object], str]] = {
    "float16": ({}, lambda model: model.half(), "embed_tokens.weight: kernels do not read torch.float16"),
    "one float16 weight": ({}, lambda model: model.layers[2].self_attn.o_proj.half(), "no kernel multiplies torch.float16"),
    "one float16 norm": ({}, lambda model: model.norm.half(), "norm.weight: kernels do not read torch.float16"),
    "on meta": ({}, lambda model: model.to("meta"), "kernels do not read torch.float32 on meta"),
    "baseline": ({"attention": "gqa", "num_key_value_heads": 2}, lambda model: model, "attention = 'gqa'"),
    "halves unlike": (
        NETWORKS["wide"], lambda model: model.layers[0].mlp.up_proj.bfloat16(), "stored in different forms",
    ),
    "a block across gate and up": (
        {}, lambda model: into_fp8_blocks(model, "layers.1.mlp.experts"), "a block lies across gate and up",
    ),
    "turned": (
        {},
        lambda model: setattr(model.layers[0].self_attn.o_proj.weight, "data", torch.randn(40, 32).t()),
        "a weight is not contiguous",
    ),
    "a format without kernels": (
        {},
        lambda model: replace_weight(model.layers[0].mlp.down_proj, "weight", tens(torch.randn(32, 48))),
        "no kernel multiplies tens",
    ),
    "an INT8 linear": (
        {},
        lambda model: replace_weight(model.layers[0].mlp.down_proj, "weight", ops.quantize_rows(torch.randn(32, 48))),
        "kernels do not read int8-rows here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_kernels_do_not_take_is_refused_before_a_weight_is_given_up(name: str) -> None:
    """And the torch model serves."""
    changes, change, reason = REFUSED[name]
    model = model_of(changes)
    change(model)
    weights = named_weights(model)
    before = dict(weights)
    assert reason in refusal(model.config, weights)
    assert weights == before
    backend = backend_of(model)
    assert isinstance(backend, TorchBackend)
    if name != "on meta":
        assert steps(backend, COUNTS)[0].isfinite().all()


def test_a_forced_backend_is_not_packed_panels() -> None:
    model = model_of({})
    with ops.use("torch"):
        assert isinstance(backend_of(model), TorchBackend)
    assert isinstance(backend_of(model), PanelBackend)
