"""ModelConfig: the paper's derived sizes, round trips through TOML and Hugging Face, refusals that say what to mend."""

import dataclasses
import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from leanseek.cli.info import find_config
from leanseek.config import ConfigError, ModelConfig, YarnConfig, preset_path, presets_folder

PRESETS = (
    "demo", "demo-unbalanced", "bench-30m", "bench-3b", "moonlight-16b", "v2-lite", "v3-671b", "v3-671b-128k"
)  # fmt: skip

# ---- derived sizes ----


def test_defaults_are_v3() -> None:
    """671B's cache: 576 values a token and layer, 70,272 bytes a token in BF16; as MHA it would be 4,997,120."""
    c = ModelConfig()
    assert c.cache_width == 576
    assert c.cache_width * c.num_hidden_layers * 2 == 70_272
    assert 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * c.num_hidden_layers == 4_997_120
    assert c.softmax_scale == 192**-0.5
    assert [c.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert ModelConfig.preset("v3-671b").to_hf() | {"rope_parameters": 0} == c.to_hf() | {"rope_parameters": 0}


@pytest.mark.parametrize(("kv_heads", "expected"), [(None, 8), (8, 8), (2, 2), (1, 1)])
def test_baseline_sizes(kv_heads: int | None, expected: int, tiny_config: Callable[..., ModelConfig]) -> None:
    """MHA, GQA and MQA cache keys and values of each key head, and rotate whole heads."""
    c = tiny_config(attention="gqa", num_attention_heads=8, num_key_value_heads=kv_heads, hidden_size=64)
    assert (c.kv_heads, c.gqa_head_dim, c.rope_dim) == (expected, 8, 8)
    assert c.cache_width == 2 * expected * 8
    assert c.softmax_scale == 8**-0.5


def test_yarn_scales() -> None:
    """4.3: the softmax scale times (0.1 · mscale_all_dim · ln 40 + 1)²; cos and sin by the ratio of the two mscales."""
    full = YarnConfig(40, 4096, mscale=1.0, mscale_all_dim=1.0)
    m = 0.1 * math.log(40) + 1
    assert full.rotary_scale == 1.0 and full.softmax_scale == pytest.approx(m * m)
    assert ModelConfig(rope_scaling=full).softmax_scale == pytest.approx(192**-0.5 * m * m)
    lite = YarnConfig(40, 4096, mscale=0.707, mscale_all_dim=0.707)
    assert lite.rotary_scale == 1.0 and lite.softmax_scale == pytest.approx((0.0707 * math.log(40) + 1) ** 2)
    plain = YarnConfig(40, 4096)
    assert plain.rotary_scale == pytest.approx(m) and plain.softmax_scale == 1.0
    assert YarnConfig(40, 4096, attention_factor=1.25).rotary_scale == 1.25
    assert YarnConfig(1, 4096, mscale_all_dim=1.0).softmax_scale == YarnConfig(1, 4096).rotary_scale == 1.0


@pytest.mark.parametrize(("eos", "expected"), [(None, ()), (1, (1,)), ((1, 5), (1, 5))])
def test_eos_token_ids(eos: object, expected: tuple[int, ...], tiny_config: Callable[..., ModelConfig]) -> None:
    assert tiny_config(eos_token_id=eos).eos_token_ids == expected


# ---- round trips ----


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Networks that both files can hold."""
    v2 = draw(st.booleans())
    yarn = st.builds(
        YarnConfig,
        st.sampled_from([1.0, 40.0]),
        st.sampled_from([16, 4096]),
        beta_fast=st.sampled_from([1.0, 32.0]),
        mscale=st.sampled_from([0.707, 1.0]),
        mscale_all_dim=st.sampled_from([0.0, 1.0]),
        attention_factor=st.sampled_from([None, 1.3]),
    )
    return ModelConfig(
        model_type="deepseek_v2" if v2 else "deepseek_v3",
        scoring_func="softmax" if v2 else "sigmoid",
        topk_method=draw(st.sampled_from(["greedy", "group_limited_greedy"])) if v2 else "noaux_tc",
        norm_topk_prob=draw(st.booleans()),
        hidden_size=draw(st.integers(1, 64)),
        q_lora_rank=draw(st.none() | st.integers(1, 8)),
        n_shared_experts=draw(st.integers(0, 2)),
        n_group=draw(st.sampled_from([1, 8])),
        topk_group=1,
        first_k_dense_replace=draw(st.integers(0, 61)),
        moe_layer_freq=draw(st.integers(1, 2)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        rope_theta=draw(st.sampled_from([10000.0, 50000.0])),
        rope_scaling=draw(st.none() | yarn),
        rope_interleave=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(st.sampled_from([0.006, 0.02])),
        bos_token_id=draw(st.sampled_from([None, 0, 7])),
        eos_token_id=draw(st.sampled_from([None, 1, (1, 2)])),
    )


@given(configs())
def test_hugging_face_round_trip(config: ModelConfig) -> None:
    """from_hf(to_hf(c)) is c, whether the reader looks at rope_scaling or at rope_parameters."""
    hf = config.to_hf()
    assert ModelConfig.from_hf(hf) == config
    for dropped in ("rope_scaling", "rope_parameters"):
        assert ModelConfig.from_hf({key: value for key, value in hf.items() if key != dropped}) == config


@given(configs())
def test_toml_round_trip(config: ModelConfig) -> None:
    """from_dict(to_dict(c)) is c, through an actual TOML file; TOML has no null."""
    if config.bos_token_id is None or config.eos_token_id is None:
        return  # TOML cannot say "none"; presets have both
    text = tomli_w.dumps({"model": config.to_dict()})
    assert ModelConfig.from_dict(tomllib.loads(text)["model"]) == config


def test_baselines_have_no_hugging_face_config(tiny_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ConfigError, match="only MLA"):
        tiny_config(attention="gqa").to_hf()


def test_dense_network_round_trip(tiny_config: Callable[..., ModelConfig]) -> None:
    """No layer of what was written reaches experts."""
    config = ModelConfig.from_hf(tiny_config(n_routed_experts=0).to_hf())
    assert not any(config.is_moe_layer(i) for i in range(config.num_hidden_layers + 1))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    """Each preset is a network, and survives its own round trip."""
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert (presets_folder() / f"{name}.toml").samefile(preset_path(name))


def test_info_sees_what_a_file_changes_of_its_preset(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('preset = "v3-671b-32k"\n[model]\nnum_hidden_layers = 4\n')
    found, preset = find_config(str(tmp_path / "own.toml")), ModelConfig.preset("v3-671b-32k")
    assert found == dataclasses.replace(preset, num_hidden_layers=4) and found.rope_scaling is not None


@pytest.mark.parametrize("name", ["no-such", "../demo", "", "demo.toml"])
def test_unknown_preset_lists_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match="v3-671b"):
        ModelConfig.preset(name)


# ---- Hugging Face configs in the wild ----

BARE = {"model_type": "deepseek_v3", "num_experts_per_tok": 2, "n_routed_experts": 8}


def test_missing_keys_mean_what_they_meant() -> None:
    """No n_group: no groups; no num_nextn_predict_layers: no MTP; no q_lora_rank: none; null is as good as missing."""
    nulls = dict.fromkeys(("n_group", "topk_group", "rope_scaling", "num_nextn_predict_layers", "scoring_func"))
    for hf in (BARE, BARE | nulls):
        c = ModelConfig.from_hf(hf)
        assert (c.n_group, c.topk_group, c.num_nextn_predict_layers, c.q_lora_rank) == (1, 1, 0, None)
        assert (c.scoring_func, c.topk_method) == ("sigmoid", "noaux_tc")
        assert c.norm_topk_prob and c.rope_interleave
        assert c.rope_scaling is None and not c.grouped_routing
    v2 = ModelConfig.from_hf(BARE | {"model_type": "deepseek_v2"})
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob) == ("softmax", "greedy", False)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [{"type": "yarn"}, {"rope_type": "yarn"}])
def test_yarn_by_any_name(key: str, kind: dict[str, str]) -> None:
    table = kind | {"factor": 4, "original_max_position_embeddings": 64, "rope_theta": 777.0, "unheard_of": 1}
    c = ModelConfig.from_hf(BARE | {key: table})
    assert c.rope_scaling == YarnConfig(4, 64) and c.rope_theta == 777.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "deepseek_v32"}, "sparse-attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "yarn", "factor": "big", "original_max_position_embeddings": 64}}, "rope_scaling"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"hidden_size": "7168"}, "hidden_size"),
    ],
)
def test_other_networks_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig.from_hf(BARE | changes)
    assert "\n" not in str(error.value)


# ---- contradictions ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": 12.5}, "hidden_size"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"q_lora_rank": -1}, "q_lora_rank"),
        ({"v_head_dim": 0}, "v_head_dim"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"moe_layer_freq": 0}, "moe_layer_freq"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"qk_rope_head_dim": 7}, "even"),
        ({"attention": "gqa", "hidden_size": 4, "num_attention_heads": 8}, "rotary"),
        ({"attention": "gqa", "num_key_value_heads": 3}, "multiple"),
        ({"attention": "linear"}, "attention"),
        ({"topk_method": "hash"}, "topk_method"),
        ({"n_routed_experts": 10}, "multiple"),
        ({"n_group": 0}, "n_group"),
        ({"topk_group": 0}, "topk_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),  # two groups of two are in reach
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"n_group": 8, "num_experts_per_tok": 1}, "at least 2"),
    ],
)
def test_contradictions(changes: dict[str, object], message: str, tiny_config: Callable[..., ModelConfig]) -> None:
    """Each is one line that names the key."""
    with pytest.raises(ConfigError, match=message) as error:
        tiny_config(**changes)
    assert "\n" not in str(error.value)


def test_unused_sizes_are_not_checked(tiny_config: Callable[..., ModelConfig]) -> None:
    """A dense network needs no expert sizes, a GQA one no latent."""
    tiny_config(n_routed_experts=0, moe_intermediate_size=0, n_group=0)
    tiny_config(attention="gqa", kv_lora_rank=0, q_lora_rank=0, v_head_dim=0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"hidden_sise": 8}, "hidden_sise"),
        ({"rope_scaling": {"factor": 4, "original_max_position_embeddings": 64, "beta_fst": 1}}, "beta_fst"),
        ({"rope_scaling": {"factor": 4}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"factor": 0.5, "original_max_position_embeddings": 64}}, "factor"),
        ({"rope_scaling": {"factor": 4, "original_max_position_embeddings": 64, "beta_slow": 0}}, "beta_slow"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_toml_mistakes(table: dict[str, object], message: str) -> None:
    """Unlike a config.json, our own file may hold no key that we do not know."""
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(table)
