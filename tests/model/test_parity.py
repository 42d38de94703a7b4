"""The network is transformers' DeepSeek network: logits whole and cached, gradients, for every switch of both types."""

import dataclasses
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

from leanseek import ops
from leanseek.config import ModelConfig, YarnConfig
from leanseek.model import Transformer

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

V2 = {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
MOONLIGHT = {
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_routed_experts": 16, "num_experts_per_tok": 6,
    "n_shared_experts": 2, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
}  # fmt: skip
V2_GROUPS = V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}


def yarn(factor: float = 40.0, original: int = 16, **more: float) -> dict[str, YarnConfig]:
    return {"rope_scaling": YarnConfig(factor, original, **more)}


V3_CASES = {
    "v3": {},
    "no-q-lora": {"q_lora_rank": None},
    "one-group": {"n_group": 1, "topk_group": 1},
    "two-groups-keep-one": {"n_group": 2, "topk_group": 1},
    "four-groups-keep-three": {"topk_group": 3, "num_experts_per_tok": 5},
    "all-groups-kept": {"topk_group": 4},
    "whole-group-chosen": {"topk_group": 1, "num_experts_per_tok": 2},
    "one-expert": {"num_experts_per_tok": 1},
    "every-expert": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8},
    "not-normalised": {"norm_topk_prob": False},
    "not-scaled": {"routed_scaling_factor": 1.0},
    "two-shared": {"n_shared_experts": 2},
    "all-moe": {"first_k_dense_replace": 0},
    "all-dense": {"first_k_dense_replace": 3},
    "tied": {"tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 1e-5},
    "large-eps": {"rms_norm_eps": 0.1},  # large enough to see which norms it reaches
    "theta": {"rope_theta": 50000.0},
    "halves": {"rope_interleave": False},
    "value-wider-than-key": {"v_head_dim": 28},
    "moonlight": MOONLIGHT,
    "yarn": yarn(mscale_all_dim=1.0),
    "yarn-mscales-differ": yarn(mscale=1.0, mscale_all_dim=0.5),
    "yarn-lite": yarn(mscale=0.707, mscale_all_dim=0.707),
    "yarn-no-all-dim": yarn(mscale=0.707),
    "yarn-factor-one": yarn(1.0, mscale_all_dim=1.0),
    "yarn-attention-factor": yarn(attention_factor=1.3, mscale_all_dim=1.0),
    "yarn-kimi": yarn(32.0, beta_fast=1.0, beta_slow=1.0, mscale_all_dim=1.0) | {"rope_theta": 50000.0},
    "yarn-zero-width-ramp": yarn(32.0, 6, beta_fast=1.0, beta_slow=1.0, mscale_all_dim=1.0),
    "yarn-halves": yarn(4.0, 32, mscale_all_dim=1.0) | {"rope_interleave": False},
    "yarn-wide-ramp": yarn(8.0, 64, mscale_all_dim=1.0) | {"qk_rope_head_dim": 16, "rope_theta": 100.0},
}
V2_CASES = {
    "v2": V2,
    "v2-no-q-lora": V2 | {"q_lora_rank": None},
    "v2-groups": V2_GROUPS,
    "v2-groups-keep-one": V2_GROUPS | {"topk_group": 1, "num_experts_per_tok": 2},
    "v2-scaled": V2_GROUPS | {"routed_scaling_factor": 16.0},
    "v2-two-shared": V2 | {"n_shared_experts": 2},
    "v2-all-moe": V2 | {"first_k_dense_replace": 0},
    "v2-all-dense": V2 | {"first_k_dense_replace": 3},
    "v2-tied": V2 | {"tie_word_embeddings": True},
    "v2-eps": V2 | {"rms_norm_eps": 1e-5},
    "v2-yarn-lite": V2 | yarn(mscale=0.707, mscale_all_dim=0.707) | {"q_lora_rank": None},
    "v2-yarn-mscales-differ": V2_GROUPS | yarn(mscale=1.0, mscale_all_dim=0.5),
}
CASES = V3_CASES | V2_CASES

SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob",
    "routed_scaling_factor", "first_k_dense_replace", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip


def peer_of(config: ModelConfig) -> PreTrainedModel:
    """The same network in transformers, written out key by key."""
    values = {key: getattr(config, key) for key in SHARED_KEYS}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        keys = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        rope |= {"rope_type": "yarn"} | {key: getattr(scaling, key) for key in keys}
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    values |= {"num_key_value_heads": config.num_attention_heads, "rope_parameters": rope}
    v2 = config.model_type == "deepseek_v2"
    values |= {"topk_method": config.topk_method} if v2 else {"rope_interleave": config.rope_interleave}
    kind, network = (DeepseekV2Config, DeepseekV2ForCausalLM) if v2 else (DeepseekV3Config, DeepseekV3ForCausalLM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = network._from_config(kind(**values), attn_implementation="eager", experts_implementation="eager")
    return peer.eval()


def copy_weights(peer: PreTrainedModel, model: Transformer) -> None:
    """Ours <- theirs: the names differ by `model.`; the load is strict, so nothing is left over on either side."""
    state = {name.removeprefix("model."): tensor for name, tensor in peer.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model.load_state_dict(state)


@pytest.fixture
def pair(
    tiny_config: Callable[..., ModelConfig], randomise: Callable[..., None]
) -> Callable[[str], tuple[Transformer, PreTrainedModel]]:
    """pair(case): our network and theirs with the same random weights."""

    def build(case: str) -> tuple[Transformer, PreTrainedModel]:
        config = tiny_config(**CASES[case])
        peer, model = peer_of(config), Transformer(config)
        randomise(peer)
        copy_weights(peer, model)
        return model, peer

    return build


def test_cases_are_enough() -> None:
    """The issue asks for at least 24 configurations across both model types."""
    assert len(V3_CASES) >= 24 and len(V2_CASES) >= 8


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, pair, decided, relative, server) -> None:
    """Theirs, from whole sequences and from the absorbed cached decode: shuffled pages, sequences at any stage."""
    model, peer = pair(case)
    tokens = decided(model, 3, 22)
    with torch.no_grad():
        expected = peer(tokens).logits
        assert relative(model(tokens), expected) <= TOLERANCE
        with ops.use("torch"):
            assert relative(model(tokens), expected) <= TOLERANCE

    lengths = (22, 9, 17)
    sequences = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    chunks = [[7, 6, 1, 0, 0, 8], [3, 1, 1, 4], [0, 0, 11, 1, 5]]  # the third joins late, the first pauses

    def check_decode() -> None:
        for s, hidden in enumerate(server(model, 3, 22).feed(sequences, chunks)):
            with torch.no_grad():
                assert relative(model.head(hidden), expected[s, : lengths[s]]) <= TOLERANCE

    check_decode()
    with ops.use("torch"):
        check_decode()
    with ops.row_invariant():  # as the engine decodes
        check_decode()


GRADIENT_CASES = (
    "v3", "no-q-lora", "not-normalised", "tied", "all-dense", "yarn", "halves", "value-wider-than-key",
    "v2", "v2-groups", "v2-yarn-lite",
)  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients(case: str, recompute: bool, pair, decided, relative) -> None:
    """Loss and every parameter's gradient, through our chunked cross entropy, are those of their loss and autograd."""
    model, peer = pair(case)
    tokens = decided(model, 2, 20)
    expected = peer(tokens, labels=tokens).loss
    expected.backward()
    hidden, _ = model.hidden(tokens[:, :-1], recompute=recompute)
    loss = model.head(hidden, tokens[:, 1:])
    loss.backward()
    assert relative(loss.detach()[None], expected.detach()[None]) <= TOLERANCE
    theirs = {name.removeprefix("model."): p.grad for name, p in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        assert gradient_error(parameter, theirs[name], relative) <= GRADIENT_TOLERANCE, name


def gradient_error(parameter: torch.nn.Parameter, theirs: Tensor | None, relative: Callable) -> float:
    assert parameter.grad is not None and theirs is not None
    assert theirs.abs().max() > 0  # else the comparison says nothing
    return relative(parameter.grad, theirs)


# ---- YaRN beyond the original window, and what other implementations got wrong about it ----

ORIGINAL = 24  # tokens


@pytest.mark.parametrize("times", [4, 16])
def test_yarn_logits_at_several_times_the_original_window(times: int, tiny_config, randomise, relative, server) -> None:
    """Float32; of whole sequences and of the absorbed decode."""
    length = ORIGINAL * times
    config = tiny_config(
        **yarn(float(times), ORIGINAL, mscale_all_dim=1.0), first_k_dense_replace=3, max_position_embeddings=length
    )
    peer, model = peer_of(config), Transformer(config)
    randomise(peer)
    copy_weights(peer, model)
    tokens = torch.randint(0, config.vocab_size, (1, length))
    with torch.no_grad():
        expected = peer(tokens).logits
        assert relative(model(tokens), expected) <= TOLERANCE
        plain = Transformer(dataclasses.replace(config, rope_scaling=None))
        plain.load_state_dict(model.state_dict())
        assert relative(plain(tokens), expected) > 100 * TOLERANCE
        with ops.row_invariant():
            (hidden,) = server(model, 1, length).feed([tokens[0]], [[length - 3, 1, 1, 1]])
        assert relative(model.head(hidden), expected[0]) <= TOLERANCE


def both(tiny_config: Callable[..., ModelConfig], **changes: object) -> tuple[Tensor, Tensor]:
    """Logits of ours and of transformers' on weights that YaRN matters for."""
    config = tiny_config(first_k_dense_replace=3, **changes)
    peer, model = peer_of(config), Transformer(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in peer.parameters():
        parameter.data.normal_(0.0, 1.0 if parameter.dim() == 1 else 0.3, generator=generator)
    copy_weights(peer, model)
    tokens = torch.randint(0, config.vocab_size, (1, 20), generator=generator)
    with torch.no_grad():
        return model(tokens), peer(tokens).logits


def test_yarn_stays_on_where_the_window_is_the_original_one_torchtitan_4117(tiny_config, relative) -> None:
    """The first steps of an extended model may have the old length: frequencies and softmax scale are YaRN's."""
    short = yarn(40.0, 32, mscale_all_dim=1.0) | {"max_position_embeddings": 32}
    ours, theirs = both(tiny_config, **short)
    assert relative(ours, theirs) <= TOLERANCE
    without, _ = both(tiny_config, max_position_embeddings=32)
    assert relative(ours, without) > 100 * TOLERANCE


def test_max_position_embeddings_is_no_part_of_yarn_megatron_1418(tiny_config, relative) -> None:
    """Correction range and factor come from rope_scaling; the window only says how far a model goes."""
    scaling = yarn(40.0, 16, mscale_all_dim=1.0)
    found = [both(tiny_config, **scaling, max_position_embeddings=window)[0] for window in (32, 128, 640)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert relative(found[0], both(tiny_config, **scaling, max_position_embeddings=640)[1]) <= TOLERANCE
    other = both(tiny_config, **yarn(40.0, 128, mscale_all_dim=1.0), max_position_embeddings=640)[0]
    assert relative(found[0], other) > 100 * TOLERANCE


def test_without_mscale_all_dim_the_scale_is_on_the_rotary_part_alone(tiny_config, relative) -> None:
    """cos and sin then carry 0.1 ln s + 1, and the softmax scale carries nothing."""
    scaling = YarnConfig(40.0, 16)
    assert scaling.softmax_scale == 1.0 and scaling.rotary_scale == pytest.approx(0.1 * math.log(40) + 1)
    ours, theirs = both(tiny_config, rope_scaling=scaling)
    assert relative(ours, theirs) <= TOLERANCE
    assert relative(ours, both(tiny_config, **yarn(40.0, 16, mscale_all_dim=1.0))[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("value", [1.0, 0.8, 1.3])
def test_an_explicit_attention_factor_takes_the_place_of_the_formula_mlx_lm_1507(
    value: float, tiny_config, relative
) -> None:
    ours, theirs = both(tiny_config, rope_scaling=YarnConfig(40.0, 16, attention_factor=value))
    assert relative(ours, theirs) <= TOLERANCE
    assert relative(ours, both(tiny_config, rope_scaling=YarnConfig(40.0, 16))[0]) > 100 * TOLERANCE
