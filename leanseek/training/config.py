"""A run: what is trained, on what, and how. One TOML file, the keys of the paper's section 4.2."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from leanseek.config import ConfigError, ModelConfig, preset_path
from leanseek.fp8 import PRECISIONS


@dataclass(frozen=True)
class DataConfig:
    path: str = "shards/shakespeare"  # a folder made by `leanseek data prepare`
    seq_len: int = 512
    fim_rate: float = 0.1  # share of documents rearranged prefix-suffix-middle


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 8  # sequences per optimizer step
    batch_size_start: int = 0  # ramped from here to batch_size over ramp (4.2); 0: no ramp
    ramp: float = 0.03  # share of the steps
    micro_batch_size: int = 0  # sequences per forward; 0: the whole batch
    dtype: str = "auto"  # of the compute: bfloat16 where the hardware multiplies it, else float32
    precision: str = "bf16"  # of the linears' products: bf16 (that is, dtype), fp8, fp8-tensorwise (docs/fp8.md)
    spike_limit: float = 10.0  # robust z-score of a loss above which its step is left out; 0: never
    device: str = "auto"
    recompute: bool = False  # norms and MLA up-projections again in backward (3.2.3)
    seed: int = 0
    log_every: int = 1
    eval_every: int = 100
    eval_sequences: int = 64  # windows of the validation split per evaluation


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 2.2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms and the embedding do not decay (optimizer.py says why)
    clip: float = 1.0
    moments: str = "auto"  # float32, or bfloat16 as the paper keeps them (3.3.3); auto: bfloat16 under FP8
    ema: float = 0.0  # decay of an averaged copy of the weights (3.2.3); 0: none


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: warm-up, constant, cosine, constant, constant (4.2). Shares are of all steps; V3's by default."""

    warmup_steps: int = 2000
    decay_start: float = 0.676  # 10 T of 14.8 T tokens
    decay_end: float = 0.966  # 14.3 T
    final_lr: float = 2.2e-5
    last_start: float = 0.989  # the last 167 B
    last_lr: float = 7.3e-6


@dataclass(frozen=True)
class BalanceConfig:
    bias_update_speed: float = 0.001  # γ
    bias_update_decay: float = 1.0  # share of γ that is left at bias_freeze, falling linearly; the paper's is constant
    bias_freeze: float = 0.966  # share of the steps after which γ = 0
    sequence_alpha: float = 1e-4  # α of the sequence-wise loss (eq. 17)
    switch_alpha: float = 0.0  # factor of the Switch loss, for the classic MoE baseline


@dataclass(frozen=True)
class MTPConfig:
    weight: float = 0.3  # λ (eq. 25)
    weight_late: float = 0.1  # λ after late_start
    late_start: float = 0.676


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    keep_last: int = 2
    keep_every: int = 0  # steps whose checkpoints are kept for good; 0: none


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run. Raises ConfigError on contradictions."""

    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ConfigError(f"name = {self.name!r} must be a plain folder name")
        for keys, fits, rule in _RULES:
            for key in keys.split():
                section, _, name = key.partition(".")
                value = getattr(getattr(self, section), name)
                if not fits(value):
                    raise ConfigError(f"{key} = {value!r} {rule}")
        if self.data.seq_len > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.seq_len = {self.data.seq_len} is beyond model.max_position_embeddings = "
                f"{self.model.max_position_embeddings}"
            )

    @classmethod
    def load(cls, source: str, overrides: list[str]) -> RunConfig:
        """From a TOML file or the name of a preset, with `section.key=value` overrides (values as in TOML).

        Raises:
            ConfigError: unknown key, wrong type or value, unreadable file.
        """
        path = Path(source) if source.endswith(".toml") else preset_path(source)
        table = _read(path)
        for override in overrides:
            _override(table, override)
        table.setdefault("name", path.stem)
        return cls.from_dict(table)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> RunConfig:
        """From a TOML file's tables; with `preset = "NAME"` they are what differs from that preset's."""
        values: dict[str, Any] = {}
        if "preset" in table:
            table = _merge(_read(preset_path(str(table["preset"]))), table)
        for key, value in table.items():
            if key == "name":
                values[key] = str(value)
            elif key == "model" and isinstance(value, dict):
                values[key] = ModelConfig.from_dict(value)
            elif key in _SECTIONS and isinstance(value, dict):
                values[key] = _section(key, value)
            elif key != "preset":
                raise ConfigError(
                    f"unknown table or key {key!r}; there are name, preset, [model], [{'], ['.join(_SECTIONS)}]"
                )
        if "model" not in values:
            raise ConfigError("the file has neither a [model] table nor preset = ...")
        return cls(**values)

    @property
    def moments(self) -> str:
        """ "float32" or "bfloat16": what `optimizer.moments` comes to."""
        if self.optimizer.moments != "auto":
            return self.optimizer.moments
        return "float32" if self.train.precision == "bf16" else "bfloat16"

    def to_toml(self) -> str:
        """The resolved file; `from_dict(tomllib.loads(...))` gives this config again."""
        table: dict[str, Any] = {"name": self.name, "model": self.model.to_dict()}
        for key in _SECTIONS:
            table[key] = dataclasses.asdict(getattr(self, key))
        return tomli_w.dumps(table)


# key(s), what a value must satisfy, and how that reads
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "train.steps train.batch_size train.log_every train.eval_every train.eval_sequences data.seq_len "
        "checkpoint.every checkpoint.keep_last",
        lambda v: v >= 1,
        "must be at least 1",
    ),
    (
        "train.batch_size_start train.micro_batch_size train.seed schedule.warmup_steps checkpoint.keep_every "
        "train.spike_limit optimizer.weight_decay "
        "balance.bias_update_speed balance.sequence_alpha balance.switch_alpha "
        "mtp.weight mtp.weight_late schedule.final_lr schedule.last_lr",
        lambda v: v >= 0,
        "must not be negative",
    ),
    ("optimizer.lr optimizer.eps optimizer.clip", lambda v: v > 0, "must be positive"),
    (
        "train.ramp data.fim_rate schedule.decay_start schedule.decay_end schedule.last_start balance.bias_freeze "
        "balance.bias_update_decay mtp.late_start",
        lambda v: 0 <= v <= 1,
        "must lie in [0, 1]",
    ),
    ("optimizer.ema", lambda v: 0 <= v < 1, "must lie in [0, 1)"),
    (
        "optimizer.betas",
        lambda v: len(v) == 2 and all(isinstance(b, float) and 0 <= b < 1 for b in v),
        "must be two numbers in [0, 1)",
    ),
    ("optimizer.moments", lambda v: v in ("auto", "float32", "bfloat16"), "is not one of auto, float32, bfloat16"),
    ("train.precision", lambda v: v in PRECISIONS, f"is not one of {', '.join(PRECISIONS)}"),
    ("train.dtype", lambda v: v in ("auto", "float32", "bfloat16"), "is not one of auto, float32, bfloat16"),
)

_SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "balance": BalanceConfig,
    "mtp": MTPConfig,
    "checkpoint": CheckpointConfig,
}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not TOML
        raise ConfigError(f"{path}: {error}") from None


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` in it, table by table."""
    return base | {
        key: _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }


def _section(name: str, values: dict[str, Any]) -> Any:
    """One table, its keys known and its values of the type of the default."""
    kind = _SECTIONS[name]
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in defaults:
            raise ConfigError(f"[{name}] has no key {key!r}; there are {', '.join(defaults)}")
        want = type(defaults[key])
        if want is float and type(value) is int:
            value = float(value)
        elif want is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not want:
            raise ConfigError(f"{name}.{key} must be {want.__name__}, not {value!r}")
        checked[key] = value
    return kind(**checked)


def _override(table: dict[str, Any], text: str) -> None:
    key, found, raw = text.partition("=")
    *sections, last = key.strip().split(".")
    if not found or not last:
        raise ConfigError(f"override {text!r} is not section.key=value")
    try:
        value = tomllib.loads(f"x = {raw}")["x"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is a string
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {text!r}: {section} is not a table")
    table[last] = value
