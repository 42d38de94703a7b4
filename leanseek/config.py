"""ModelConfig: everything that defines the network, with the key names of Hugging Face's `deepseek_v3` config.

Sources: the technical report (arXiv 2412.19437, sections 2.1, 4.2, 4.3) and the published `config.json` files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, create_model

from leanseek.errors import InputError
from leanseek.reading import Structure, checked, read_toml, shorten


class ConfigError(InputError):
    """An invalid configuration; the message is one line and says how to fix it."""


# Bounds far above any real network, so that a typo is reported before it costs hours or all memory.
Size = Annotated[int, Field(ge=0, le=2**20)]  # 0 if the network has no such part; `_sizes` checks the ones it needs
Layers = Annotated[int, Field(ge=0, le=2**12)]
Number = Annotated[int, Field(ge=0, le=2**16)]
Ids = Annotated[int, Field(ge=0, lt=2**24)]
Positions = Annotated[int, Field(ge=1, le=2**31)]
Positive = Annotated[float, Field(gt=0, le=1e15)]
Real = Annotated[float, Field(ge=-1e9, le=1e9)]


class _Checked:
    """A dataclass that always checks its fields against their annotations."""

    def __post_init__(self) -> None:
        for name, value in checked(self._structure(), vars(self), self._where(), ConfigError):
            object.__setattr__(self, name, value)  # an int in a float field becomes a float

    @staticmethod
    def _where() -> str:
        return "the network"

    @classmethod
    @functools.cache
    def _structure(cls) -> type[Structure]:
        hints = get_type_hints(cls, include_extras=True)
        fields: dict[str, Any] = {f.name: (hints[f.name], ...) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return create_model(cls.__name__, __base__=Structure, **fields)


@dataclass(frozen=True)
class YarnConfig(_Checked):
    """YaRN context extension (section 4.3), with the keys of `rope_scaling` in a published config.

    Raises:
        ConfigError: a value has the wrong type or is out of bounds.
    """

    factor: Annotated[float, Field(ge=1, le=1e6)]
    original_max_position_embeddings: Positions
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    mscale_all_dim: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    attention_factor: Positive | None = None  # when set, overrides the ratio of the two mscales

    @staticmethod
    def _where() -> str:
        return "rope_scaling"

    @staticmethod
    def _mscale(factor: float, mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    @property
    def rotary_scale(self) -> float:
        """The factor for cos and sin: mscale(factor, mscale) / mscale(factor, mscale_all_dim)."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.factor, self.mscale) / self._mscale(self.factor, self.mscale_all_dim)
        return self._mscale(self.factor, 1.0)

    @property
    def softmax_scale(self) -> float:
        """The factor for the attention's softmax scale: mscale(factor, mscale_all_dim) squared."""
        return self._mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


# model_type names under which this network is published
_V3_TYPES = ("deepseek_v3", "kimi_k2", "youtu_llm", "youtu")
_V2_TYPES = ("deepseek_v2",)


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """A DeepSeek-V3 family network, or one of the baselines the paper compares it with.

    Baselines: `attention="gqa"` with `num_key_value_heads` equal to the heads (MHA), between (GQA) or 1 (MQA);
    `n_routed_experts=0` (dense FFN); `scoring_func="softmax", topk_method="greedy"` with 8 large experts (classic MoE).

    Raises:
        ConfigError: the values contradict each other.
    """

    vocab_size: Ids = 129280
    hidden_size: Size = 7168
    intermediate_size: Size = 18432
    moe_intermediate_size: Size = 2048
    num_hidden_layers: Layers = 61
    num_attention_heads: Number = 128
    # attention (2.1.1)
    attention: Literal["mla", "gqa"] = "mla"
    q_lora_rank: Size | None = 1536
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    num_key_value_heads: Number | None = None  # gqa baseline only; MLA has one latent for all heads
    head_dim: Size | None = None  # gqa baseline only; defaults to hidden_size / num_attention_heads
    # DeepSeekMoE (2.1.2)
    n_routed_experts: Number = 256
    num_experts_per_tok: Number = 8
    n_shared_experts: Number = 1
    n_group: Number = 8
    topk_group: Number = 4
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: Real = 2.5
    first_k_dense_replace: Layers = 3
    moe_layer_freq: Layers = 1
    # multi-token prediction (2.2)
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=64)] = 1
    # positions (4.3)
    rope_theta: Positive = 10000.0
    rope_scaling: YarnConfig | None = None
    rope_interleave: bool = True
    max_position_embeddings: Positions = 4096
    # the rest
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: Annotated[float, Field(ge=0, le=1e3)] = (
        0.006  # 4.2: the report's value; published configs carry 0.02
    )
    num_labels: Annotated[int, Field(ge=0, le=1)] = 0  # 1: a reward model, with a `score` in place of the output head
    bos_token_id: Ids | None = 0
    eos_token_id: Ids | tuple[Ids, ...] | None = 1
    model_type: str = "deepseek_v3"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in self._sizes():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.model_type not in _V3_TYPES + _V2_TYPES:
            raise ConfigError(
                f"model_type = {shorten(repr(self.model_type))} is not one of {', '.join(_V3_TYPES + _V2_TYPES)}"
            )
        for token in (self.bos_token_id, *self.eos_token_ids):
            if token is not None and token >= self.vocab_size:
                raise ConfigError(f"token {token} (bos or eos) is beyond vocab_size = {self.vocab_size}")
        if self.rope_scaling and self.rope_theta <= 1:
            raise ConfigError(
                f"rope_theta = {self.rope_theta} must be above 1 under rope_scaling (YaRN divides by its log)"
            )
        if self.num_labels and self.num_nextn_predict_layers:
            raise ConfigError("a reward model (num_labels = 1) predicts no tokens: num_nextn_predict_layers must be 0")
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise ConfigError(f"the rotary dimension must be even and at least 2, not {self.rope_dim}")
        if self.attention == "gqa" and self.num_attention_heads % self.kv_heads:
            raise ConfigError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.n_routed_experts:
            self._check_experts()

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """Names of the sizes this network uses, and the minimum of each."""
        yield from ((name, 1) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"))
        yield from ((name, 1) for name in ("intermediate_size", "moe_layer_freq"))
        yield from ((name, 0) for name in ("n_routed_experts", "n_shared_experts", "first_k_dense_replace"))
        yield "num_nextn_predict_layers", 0
        if self.attention == "mla":
            yield from ((name, 1) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
            if self.q_lora_rank is not None:
                yield "q_lora_rank", 1
        if self.n_routed_experts:
            yield from ((name, 1) for name in ("moe_intermediate_size", "n_group", "num_experts_per_tok"))

    def _check_experts(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups:
            raise ConfigError(f"n_routed_experts = {experts} must be a multiple of n_group = {groups}")
        if not 1 <= self.topk_group <= groups:
            raise ConfigError(f"topk_group = {self.topk_group} must lie between 1 and n_group = {groups}")
        reachable = experts // groups * self.topk_group if self.grouped_routing else experts
        if not 1 <= self.num_experts_per_tok <= reachable:
            raise ConfigError(
                f"num_experts_per_tok = {self.num_experts_per_tok} must lie between 1 and the {reachable} in reach"
            )
        if self.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
            raise ConfigError("noaux_tc scores a group by its two best experts: a group needs at least 2")

    # ---- derived ----

    @property
    def grouped_routing(self) -> bool:
        """Whether node-limited routing restricts the choice of experts."""
        return self.topk_method != "greedy" and self.n_group > 1

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def gqa_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """Dimensions that RoPE rotates: the decoupled key of MLA, or the whole head of the baselines."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.gqa_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention scores, including YaRN's correction."""
        head = self.qk_head_dim if self.attention == "mla" else self.gqa_head_dim
        return head**-0.5 * (self.rope_scaling.softmax_scale if self.rope_scaling else 1.0)

    @property
    def cache_width(self) -> int:
        """Values cached per token and layer: the latent and the shared rotary key (MLA), or keys and values."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.gqa_head_dim

    @property
    def selection_bias(self) -> bool:
        """Whether the gate has `e_score_correction_bias` (auxiliary-loss-free balancing)."""
        return self.topk_method == "noaux_tc"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` has routed experts. MTP blocks are numbered from num_hidden_layers on."""
        return bool(self.n_routed_experts and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0)

    @property
    def lookahead(self) -> int:
        """1 + D: tokens that a training sample holds behind its window, where the last positions' targets are.

        Each position predicts the next token, and with each MTP module one further on.
        """
        return 1 + self.num_nextn_predict_layers

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    # ---- Hugging Face, TOML ----

    @staticmethod
    def _where() -> str:
        return "the model's configuration"

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """The network of a published `config.json`; keys that this family does not use are ignored.

        Raises:
            ConfigError: it is another architecture, or uses an option that we do not support.
        """
        published = checked(_Published, hf, "the model's configuration", ConfigError)
        kind = published.model_type
        if kind == "deepseek_v32":
            raise ConfigError("deepseek_v32 adds a sparse-attention indexer, which is not supported (deepseek_v3 is)")
        if kind not in _V3_TYPES + _V2_TYPES:
            raise ConfigError(f"model_type {shorten(repr(kind))} is not of the DeepSeek-V2/V3 family")
        if published.attention_bias:
            raise ConfigError("attention_bias = true is not part of DeepSeek-V3; this checkpoint is not supported")
        if published.hidden_act not in (None, "silu"):
            raise ConfigError(f"hidden_act = {shorten(published.hidden_act)!r}: DeepSeek-V3's experts use silu")
        v2 = kind in _V2_TYPES
        values: dict[str, Any] = {"model_type": kind, "n_group": 1, "topk_group": 1, "n_shared_experts": 0}
        values |= {"scoring_func": "softmax" if v2 else "sigmoid", "topk_method": "greedy" if v2 else "noaux_tc"}
        values |= {"norm_topk_prob": not v2, "num_nextn_predict_layers": hf.get("num_mtp_layers") or 0}
        if kind in ("youtu_llm", "youtu"):
            values["n_routed_experts"] = 0
        names = {f.name for f in dataclasses.fields(cls)}
        # HF writes these for its own use; MLA has no such heads
        names -= {"num_key_value_heads", "head_dim", "attention", "num_labels"}
        values |= {name: hf[name] for name in names if hf.get(name) is not None}
        if published.scores:
            values |= {"num_labels": published.labels, "num_nextn_predict_layers": 0}
        for none in ("q_lora_rank", "bos_token_id", "eos_token_id"):  # null means none
            if none in hf or none == "q_lora_rank":
                values[none] = hf.get(none)
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        if "n_routed_experts" in hf and hf["n_routed_experts"] is None:
            values["n_routed_experts"] = 0
        values["rope_theta"], values["rope_scaling"] = _rope_from_hf(published)
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` with the published keys and those that transformers 5 reads.

        Raises:
            ConfigError: the network is a baseline, for which Hugging Face has no DeepSeek class.
        """
        if self.attention != "mla":
            raise ConfigError("only MLA networks have a Hugging Face DeepSeek config; this one has attention = 'gqa'")
        v2 = self.model_type in _V2_TYPES
        own = ("attention", "head_dim", "rope_scaling", "num_labels")
        hf = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        kind = "ForSequenceClassification" if self.num_labels else "ForCausalLM"
        hf["architectures"] = [f"Deepseek{'V2' if v2 else 'V3'}{kind}"]
        if self.num_labels:
            hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        hf["model_type"] = "deepseek_v2" if v2 else "deepseek_v3"
        hf["num_key_value_heads"] = self.num_attention_heads
        hf["hidden_act"] = "silu"
        hf["attention_bias"] = False
        hf["attention_dropout"] = 0.0
        hf["ep_size"] = 1
        if not self.n_routed_experts:  # a dense network: no layer has experts
            hf["first_k_dense_replace"] = self.num_hidden_layers
        if isinstance(hf["eos_token_id"], tuple):
            hf["eos_token_id"] = list(hf["eos_token_id"])
        hf["rope_scaling"] = None
        hf["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling:
            yarn = {k: v for k, v in dataclasses.asdict(self.rope_scaling).items() if v is not None}
            hf["rope_scaling"] = {"type": "yarn", **yarn}
            hf["rope_parameters"] = {"rope_type": "yarn", "rope_theta": self.rope_theta, **yarn}
        return hf

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """From the `[model]` table of a TOML file. Unlike in `from_hf`, an unknown key is an error.

        Raises:
            ConfigError: a key is unknown, or values contradict each other.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"[model] has no key {unknown[0]!r}")
        values = dict(values)
        if values.get("q_lora_rank") == 0:  # TOML has no null
            values["q_lora_rank"] = None
        if isinstance(values.get("rope_scaling"), dict):
            if unknown := sorted(set(values["rope_scaling"]) - _YARN_KEYS):
                raise ConfigError(f"[model.rope_scaling] has no key {unknown[0]!r}")
            values["rope_scaling"] = _yarn(values["rope_scaling"])
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`: plain values, no None."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        values["q_lora_rank"] = self.q_lora_rank or 0
        if self.rope_scaling:
            values["rope_scaling"] = {k: v for k, v in values["rope_scaling"].items() if v is not None}
        if isinstance(values.get("eos_token_id"), tuple):
            values["eos_token_id"] = list(values["eos_token_id"])
        return values

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The network of `configs/{name}.toml`.

        Raises:
            ConfigError: unknown preset; the message lists them.
        """
        return cls.from_dict(merged(with_presets({"preset": name})).get("model", {}))


_YARN_KEYS = {f.name for f in dataclasses.fields(YarnConfig)}


def _yarn(table: dict[str, Any]) -> YarnConfig:
    for required in ("factor", "original_max_position_embeddings"):
        if table.get(required) is None:
            raise ConfigError(f"rope_scaling of type yarn has no {required}")
    return YarnConfig(**{k: v for k, v in table.items() if k in _YARN_KEYS and v is not None})


class _Published(Structure):
    """The keys of a published config.json that decide whether we can build the network, and its RoPE."""

    model_type: str = "deepseek_v3"
    attention_bias: bool | None = None
    hidden_act: str | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    architectures: list[str] | None = None
    id2label: dict[str, Any] | None = None
    num_labels: int | None = None

    @property
    def scores(self) -> bool:
        """Whether it is a reward model."""
        return any(name.endswith("ForSequenceClassification") for name in self.architectures or ())

    @property
    def labels(self) -> int:
        """Outputs of a reward model's head; 2 where nothing says so, as in transformers."""
        return len(self.id2label) if self.id2label is not None else self.num_labels or 2


class _Rope(Structure):
    """The keys of `rope_scaling` (published) and `rope_parameters` (transformers 5) besides YaRN's."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None

    @property
    def kind(self) -> str | None:
        return self.rope_type or self.type


def _rope_from_hf(hf: _Published) -> tuple[float, YarnConfig | None]:
    """rope_theta and YaRN. If there are two tables, one of type "default" is ignored; otherwise they must agree.

    Raises:
        ConfigError: the tables contradict each other, or use something that this family does not.
    """
    found = [(name, table) for name in ("rope_scaling", "rope_parameters") if (table := getattr(hf, name))]
    parts = [checked(_Rope, table, name, ConfigError) for name, table in found]
    for part, (name, _) in zip(parts, found, strict=True):
        if part.rope_type and part.type and part.rope_type != part.type:
            raise ConfigError(f"{name} has another rope_type than type; keep one")
        if (part.kind or "default") not in ("default", "yarn", "deepseek_yarn"):
            raise ConfigError(f"{name} of type {shorten(repr(part.kind))} is not used by this family (yarn is)")
    scaled = [table for part, (_, table) in zip(parts, found, strict=True) if (part.kind or "default") != "default"]
    if len(scaled) == 2 and _yarn(scaled[0]) != _yarn(scaled[1]):
        raise ConfigError("rope_scaling and rope_parameters contradict each other; keep one")
    thetas = {theta for theta in (hf.rope_theta, *(part.rope_theta for part in parts)) if theta is not None}
    if len(thetas) > 1:
        raise ConfigError(f"rope_theta is given as {' and as '.join(map(str, sorted(thetas)))}; keep one")
    return thetas.pop() if thetas else 10000.0, _yarn(scaled[0]) if scaled else None


def presets_folder() -> Path:
    """The folder of the presets: beside the package in a checkout, inside it once installed."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def preset_path(name: str) -> Path:
    """The TOML file of a preset.

    Raises:
        ConfigError: unknown preset; the message lists them.
    """
    folder = presets_folder()
    path = folder / f"{name}.toml"
    if Path(name).name != name or not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise ConfigError(f"no preset {name!r}; there are {known}")
    return path


def with_presets(table: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables to merge, base first: those of the presets that a TOML file builds on, then its own.

    Raises:
        ConfigError: unknown preset, or one that leads back to itself.
    """
    layers = [table]
    while "preset" in layers[0]:
        layers.insert(0, read_toml(preset_path(str(layers[0]["preset"])), ConfigError))
        if len(layers) > 8:
            raise ConfigError(f"preset = {table['preset']!r} leads back to itself")
    return layers


def merged(layers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One table of several, each of which overrides those before it, table by table."""
    return functools.reduce(_merge, layers, {})


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }
