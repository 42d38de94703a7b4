"""A step as one native call computes what it computes op by op."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from leanseek import native, ops
from leanseek.checkpoint.blocks import quantize_blocks
from leanseek.config import ModelConfig
from leanseek.model import Transformer
from tests.conftest import TINY

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


def steps(model: Transformer, counts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of several sequences' new tokens -> all hidden states, and the cache."""
    c, page, per = model.config, 4, 8
    cache = torch.zeros(c.num_hidden_layers, 3 * page * per, c.cache_width, dtype=model.embed_tokens.weight.dtype)
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
        found.append(model.step(tokens, cache, index))
    return torch.cat(found), cache


COUNTS = [[5, 12, 1], [1, 1, 1], [3, 1, 7]]


@pytest.mark.parametrize("variant", native.usable_variants())
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_as_op_by_op(name: str, variant: str) -> None:
    model = model_of(NETWORKS[name])
    with native.use_variant(variant), ops.row_invariant():
        expected, cache = steps(model, COUNTS)
        model.freeze()
        got, planned_cache = steps(model, COUNTS)
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

    def run() -> list[torch.Tensor]:
        cache = torch.zeros(layers + 1, 16, model.config.cache_width)
        hidden = model.step(tokens, cache, index)
        ahead = model.step_ahead(1, hidden, tokens + 1, cache, index)
        return [hidden, ahead, model.logits(ahead), cache]

    with native.use_variant(variant), ops.row_invariant():
        expected = run()
        model.freeze()
        got = run()
    assert float(expected[3][layers].abs().max()) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", native.usable_variants())
@torch.no_grad()
def test_nearer_to_float32_than_bf16_op_by_op(variant: str) -> None:
    """In BF16 the planned step rounds less often. Every expert is chosen, so that no rounding changes the choice."""
    changes = NETWORKS["wide"] | {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    model = model_of(changes, torch.bfloat16)
    exact, _ = steps(model_of(changes, torch.bfloat16).float(), COUNTS)
    with native.use_variant(variant), ops.row_invariant():
        by_op, _ = steps(model, COUNTS)
        model.freeze()
        planned, _ = steps(model, COUNTS)
    assert not torch.equal(planned, by_op)  # or nothing was planned
    error = [float((x.float() - exact).square().mean()) for x in (planned, by_op)]
    assert error[0] <= 1.1 * error[1]


@pytest.mark.parametrize("variant", native.usable_variants())
@torch.no_grad()
def test_fp8_blocks_and_an_int8_head(variant: str) -> None:
    """Against the same weights dequantised to float32."""
    model, exact = (model_of(NETWORKS["wide"]) for _ in range(2))
    for (name, module), other in zip(model.named_modules(), exact.modules(), strict=True):
        for leaf in [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1]:
            if not name.startswith(("layers.0.mlp", "layers.1.self_attn", "layers.1.mlp.experts")):
                continue
            weight = getattr(module, leaf).data
            parts = [quantize_blocks(part) for part in weight.reshape(-1, *weight.shape[-2:])]
            codes, scale = (torch.stack(both) for both in zip(*parts, strict=True))
            codes, scale = codes.view(weight.shape), scale.view(*weight.shape[:-2], *scale.shape[-2:])
            setattr(module, leaf, torch.nn.Parameter(codes, requires_grad=False))
            setattr(module, f"{leaf}_scale_inv", scale)
            getattr(other, leaf).copy_(ops.dequantize_blocks(codes, scale))
    model.quantize_head()
    model.freeze()
    with native.use_variant(variant), ops.row_invariant():
        got, _ = steps(model, COUNTS)
        logits = model.head(got)
    expected, _ = steps(exact, COUNTS)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    error = (logits - exact.head(got)).abs().max() / exact.head(got).abs().max()
    assert 0 < error < 0.01
