"""RunConfig: what a run trains, on what data, and how. One TOML file with the settings of the paper's section 4.2."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import tomli_w

from leanseek.config import ConfigError, ModelConfig, merged, preset_path, with_presets
from leanseek.fp8 import PRECISIONS
from leanseek.reading import read_toml, shorten
from leanseek.training.origin import check_change, network_of


@dataclass(frozen=True)
class DataConfig:
    path: str = "shards/shakespeare"  # a folder made by `leanseek data prepare`
    seq_len: int = 512
    fim_rate: float = 0.1  # share of documents rearranged prefix-suffix-middle


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 8  # sequences per optimizer step
    batch_size_start: int = 0  # the batch grows from here to batch_size (4.2); 0: no ramp
    ramp: float = 0.03  # share of the steps over which it grows
    micro_batch_size: int = 0  # sequences per forward; 0: the whole batch
    dtype: str = "auto"  # compute dtype: bfloat16 if the hardware multiplies it, else float32
    precision: str = "bf16"  # of the linears' products: bf16 (meaning dtype), fp8 or one of its variants (docs/fp8.md)
    spike_limit: float = 10.0  # robust z-score of the loss from which on a step is skipped; 0: never
    device: str = "auto"
    recompute: bool = False  # recompute norms and MLA up-projections in backward (3.2.3)
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
    moments: str = "auto"  # float32, or bfloat16 as in the paper (3.3.3); auto: bfloat16 with FP8
    ema: float = 0.0  # decay of an averaged copy of the weights (3.2.3); 0: none


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: warm-up, constant, cosine, constant, constant (4.2). Points are shares of all steps, V3's by
    default."""

    warmup_steps: int = -1  # -1: V3's 2,000, or a fifth of a run shorter than 10,000; resolved in RunConfig
    decay_start: float = 0.676  # 10 T of 14.8 T tokens
    decay_end: float = 0.966  # 14.3 T
    final_lr: float = 2.2e-5
    last_start: float = 0.989  # the last 167 B
    last_lr: float = 7.3e-6


@dataclass(frozen=True)
class BalanceConfig:
    bias_update_speed: float = 0.001  # γ
    bias_update_decay: float = 1.0  # γ decays linearly to this share at bias_freeze; constant in the paper
    bias_freeze: float = 0.966  # share of the steps after which γ = 0
    sequence_alpha: float = 1e-4  # α of the sequence-wise loss (eq. 17)
    switch_alpha: float = 0.0  # weight of the Switch loss, for the classic MoE baseline


@dataclass(frozen=True)
class MTPConfig:
    weight: float = 0.3  # λ (eq. 25)
    weight_late: float = 0.1  # λ after late_start
    late_start: float = 0.676


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    keep_last: int = 2
    keep_every: int = 0  # checkpoints at multiples of this step are kept forever; 0: none


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of a run divide its work (docs/scale-out.md). The batch is divided over ranks / (pp · cp)."""

    pp: int = 1  # pipeline stages, or pairs of them in a V
    ep: int = 1  # ranks over which each layer's routed experts are spread
    cp: int = 1  # ranks that share a sequence
    zero: bool = False  # ZeRO-1: each rank keeps the moments of its share of the weights (3.2.3)
    fsdp: bool = False  # FSDP2: each rank keeps its share of weights, gradients and moments
    schedule: str = "dualpipev"  # of the pipeline: 1f1b, zb1p or dualpipev
    ranks_per_node: int = 0  # rows for experts go between nodes once, then within a node; 0: all ranks are one node
    trace: bool = False  # record the pipeline's timeline and draw it beside the plan's


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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    source: str = ""  # `from`: a run, checkpoint or Hugging Face folder whose weights it begins with; "": random ones
    notes: tuple[str, ...] = field(default=(), compare=False)  # settings chosen for the user, to be printed

    def __post_init__(self) -> None:
        if not _is_folder_name(self.name):
            raise ConfigError(f"name = {self.name[:100]!r} must be a plain folder name")
        for keys, fits, rule in _RULES:
            for key in keys.split():
                section, _, name = key.partition(".")
                value = getattr(getattr(self, section), name)
                if not fits(value):
                    raise ConfigError(f"{key} = {shorten(repr(value))} {rule}")
        for key, value in _numbers(self):
            if not math.isfinite(value):
                raise ConfigError(f"{key} = {shorten(repr(value))} must be a finite number")
            if value and not _TINY <= abs(value) <= _HUGE:
                what = "0" if abs(value) < _TINY else "infinite"
                raise ConfigError(f"{key} = {value!r} is {what} in float32; use 1.2e-38 to 3.4e38")
        if self.schedule.warmup_steps < 0:
            warmup = _warmup(self.train.steps, self.schedule.decay_start)
            object.__setattr__(self, "schedule", dataclasses.replace(self.schedule, warmup_steps=warmup))
        if contradiction := next(_contradictions(self), None):
            raise ConfigError(contradiction)

    @classmethod
    def load(cls, source: str, overrides: list[str], runs: Path | None = None) -> Self:
        """From a TOML file or the name of a preset, with `section.key=value` overrides (values as in TOML).

        With `from`, the network is that of the checkpoint, whose config is read; keys of [model] override it. If the
        run of this name in the folder `runs` began so, it is going to be resumed: it has that network, and the
        checkpoint may be gone.

        Raises:
            ConfigError: unknown key, wrong type or value, a contradiction, unreadable file.
        """
        path = Path(source).expanduser() if source.endswith(".toml") else preset_path(source)
        table, changes = _read(path), dict[str, Any]()
        for override in overrides:
            _override(changes, override)
        if "preset" in changes:
            table["preset"] = changes.pop("preset")
        table.setdefault("name", path.stem)
        layers = [*with_presets(table), changes]
        given = merged(layers)
        if stored := _begun(runs, given):
            return cls._from_layers([{key: stored[key] for key in ("from", "model")}, *layers])
        if "from" not in given:
            return cls._from_layers(layers)
        before = network_of(_path("from", given["from"]))
        run = cls._from_layers([{"model": before.to_dict()}, *layers])
        check_change(run.source, before, run.model)
        return run

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Self:
        """From a TOML file's tables; with `preset = "NAME"` they override that preset's. With `from` they hold the
        whole network all the same: no checkpoint is read."""
        return cls._from_layers(with_presets(table))

    @classmethod
    def _from_layers(cls, layers: list[dict[str, Any]]) -> Self:
        """From tables, each of which overrides those before it."""
        table = merged(layers)
        sections = cls.sections()
        values: dict[str, Any] = {"notes": _fit_warmup(layers, table, sections)}
        for key, value in table.items():
            if key == "name":
                if not isinstance(value, str):
                    raise ConfigError(f"name must be a string, not {shorten(repr(value))}")
                values[key] = value
            elif key == "from":
                values["source"] = _path(key, value)
            elif key == "model" and isinstance(value, dict):
                values[key] = ModelConfig.from_dict(value)
            elif key in sections and isinstance(value, dict):
                values[key] = _section(key, value, sections[key])
            elif key != "preset":
                raise ConfigError(
                    f"unknown table or key {shorten(repr(key))}; "
                    f"there are name, from, preset, [model], [{'], ['.join(sections)}]"
                )
        if "model" not in values:
            raise ConfigError("the file has neither a [model] table nor preset = ... nor from = ...")
        return cls(**values)

    @classmethod
    def sections(cls) -> dict[str, Any]:
        """The tables besides [model], each with its defaults."""
        return {f.name: f.default_factory() for f in dataclasses.fields(cls) if callable(f.default_factory)}

    def with_tokens(self, bos: int | None, eos: tuple[int, ...]) -> Self:
        """The same run with the tokenizer's bos and eos tokens in its model.

        The end tokens of [model] stay if they include the tokenizer's own.
        """
        ends = self.model.eos_token_ids if eos[0] in self.model.eos_token_ids else eos
        end = ends[0] if len(ends) == 1 else ends
        return dataclasses.replace(self, model=dataclasses.replace(self.model, bos_token_id=bos, eos_token_id=end))

    @property
    def moments(self) -> str:
        """ "float32" or "bfloat16": `optimizer.moments` with auto resolved."""
        if self.optimizer.moments != "auto":
            return self.optimizer.moments
        return "float32" if self.train.precision == "bf16" else "bfloat16"

    def to_toml(self) -> str:
        """The resolved configuration; `from_dict(tomllib.loads(...))` gives it back."""
        table: dict[str, Any] = {"name": self.name} | ({"from": self.source} if self.source else {})
        table["model"] = self.model.to_dict()
        for key in self.sections():
            table[key] = dataclasses.asdict(getattr(self, key))
        return tomli_w.dumps(table)


# key(s), the condition on a value, and how the message states it
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "train.steps train.batch_size train.log_every train.eval_every train.eval_sequences data.seq_len "
        "checkpoint.every checkpoint.keep_last",
        lambda v: v >= 1,
        "must be at least 1",
    ),
    (
        "train.batch_size_start train.micro_batch_size train.seed checkpoint.keep_every "
        "train.spike_limit optimizer.weight_decay "
        "balance.bias_update_speed balance.sequence_alpha balance.switch_alpha "
        "mtp.weight mtp.weight_late schedule.final_lr schedule.last_lr",
        lambda v: v >= 0,
        "must not be negative",
    ),
    ("schedule.warmup_steps", lambda v: v >= -1, "must not be negative (-1: by the length of the run)"),
    ("train.seed", lambda v: v < 2**63, "must be below 2^63"),
    (
        "train.steps train.log_every train.eval_every train.eval_sequences checkpoint.every checkpoint.keep_last "
        "checkpoint.keep_every data.seq_len schedule.warmup_steps",
        lambda v: v < 2**31,
        "must be below 2^31",
    ),
    ("train.batch_size train.micro_batch_size", lambda v: v <= 2**20, "must be at most 1,048,576 sequences"),
    (
        "train.device",
        lambda v: re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", v) is not None,
        "is not one of auto, cpu, cuda, cuda:0, cuda:1 ...",
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
    ("parallel.pp parallel.ep parallel.cp", lambda v: 1 <= v <= 2**16, "must be 1 to 65,536 ranks"),
    ("parallel.ranks_per_node", lambda v: 0 <= v <= 2**16, "must be 0 to 65,536 ranks"),
    ("parallel.schedule", lambda v: v in ("1f1b", "zb1p", "dualpipev"), "is not one of 1f1b, zb1p, dualpipev"),
    ("train.dtype", lambda v: v in ("auto", "float32", "bfloat16"), "is not one of auto, float32, bfloat16"),
)

_V3_WARMUP = 2000  # steps (4.2)
_TINY, _HUGE = 2.0**-126, 2.0**128 * (1 - 2**-24)  # range of float32, in which we compute with them


def _warmup(steps: int, decay_start: float) -> int:
    """Default length of the warm-up, in steps."""
    return min(_V3_WARMUP, steps // 5, int(decay_start * steps))


def _contradictions(run: RunConfig) -> Iterator[str]:
    """A line for each pair of settings that contradict each other."""
    t, s, o, c = run.train, run.schedule, run.optimizer, run.checkpoint
    if run.data.seq_len > run.model.max_position_embeddings:
        limit = run.model.max_position_embeddings
        yield f"data.seq_len = {run.data.seq_len} is beyond model.max_position_embeddings = {limit}"
    if s.warmup_steps > s.decay_start * t.steps:
        yield (
            f"schedule.warmup_steps = {s.warmup_steps} ends after the decay begins: decay_start = "
            f"{s.decay_start} of train.steps = {t.steps} is step {int(s.decay_start * t.steps)}; shorten the warm-up"
        )
    order = ("decay_start", "decay_end", "last_start")
    for first, second in itertools.pairwise(order):
        if getattr(s, first) > getattr(s, second):
            yield (
                f"schedule.{first} = {getattr(s, first)} comes after {second} = {getattr(s, second)}; "
                "decay_start, decay_end and last_start follow each other"
            )
    for low, value, high, peak in (
        ("schedule.final_lr", s.final_lr, "optimizer.lr", o.lr),
        ("schedule.last_lr", s.last_lr, "schedule.final_lr", s.final_lr),
    ):
        if value > peak:
            yield f"{low} = {value} is above {high} = {peak}, so the rate would rise where it should fall; lower {low}"
    if o.lr * o.weight_decay >= 1:
        yield (
            f"optimizer.lr = {o.lr} times optimizer.weight_decay = {o.weight_decay} is 1 or more: each step "
            "would flip the sign of every weight; lower one of them"
        )
    if t.batch_size_start > t.batch_size:
        yield f"train.batch_size_start = {t.batch_size_start} is above train.batch_size = {t.batch_size}"
    if t.batch_size_start and not t.ramp:
        yield f"train.batch_size_start = {t.batch_size_start} has no effect while train.ramp = 0; set one of them"
    # BF16 has 8 significant bits, so a relative change below 2^-8 can round to nothing
    if run.moments == "bfloat16" and any(1 - beta < 2**-8 for beta in o.betas):
        yield (
            f"optimizer.betas = {list(o.betas)}: bfloat16 moments never decay by a factor above 0.9961 (the change "
            'is rounded away); lower it or set optimizer.moments = "float32"'
        )
    if c.keep_every % c.every:
        yield (
            f"checkpoint.keep_every = {c.keep_every} is not a multiple of checkpoint.every = {c.every}: "
            "there are no checkpoints at such steps"
        )


def _numbers(run: RunConfig) -> Iterator[tuple[str, float]]:
    """Every float, with its key."""
    for section in ("model", *run.sections()):
        for key, value in dataclasses.asdict(getattr(run, section)).items():
            for name, part in value.items() if isinstance(value, dict) else [("", value)]:
                for number in part if isinstance(part, tuple) else (part,):
                    if isinstance(number, float):
                        yield f"{section}.{key}{name and '.'}{name}", number


def _is_folder_name(name: str) -> bool:
    plain = name not in ("", ".", "..") and "/" not in name and "\\" not in name and name.isprintable()
    return plain and len(name.encode()) <= 200


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    return read_toml(path, ConfigError)


def _fit_warmup(layers: list[dict[str, Any]], table: dict[str, Any], sections: dict[str, Any]) -> tuple[str, ...]:
    """If nobody chose a warm-up for a run of this length, sets the default in `table`; returns notes on it."""

    def given(section: str, key: str) -> tuple[int, Any]:
        """The last layer with the key (-1: none), and its value."""
        found = [
            (i, t[section][key]) for i, t in enumerate(layers) if isinstance(t.get(section), dict) and key in t[section]
        ]
        by, value = found[-1] if found else (-1, getattr(sections[section], key))
        return by, float(value) if key == "decay_start" and value in (0, 1) else value

    (by, warmup), (shortened_by, steps), (_, start) = (
        given("schedule", "warmup_steps"),
        given("train", "steps"),
        given("schedule", "decay_start"),
    )
    if type(warmup) is not int or type(steps) is not int or not isinstance(start, float) or not 0 <= start <= 1:
        return ()  # invalid; refused later
    if max(steps, warmup) >= 2**31:  # also refused later; a float cannot hold a number of 400 digits
        return ()
    fitting = _warmup(steps, start)
    if by >= 0 and shortened_by > by and warmup > start * steps and isinstance(table["schedule"], dict):
        table["schedule"] = table["schedule"] | {"warmup_steps": -1}
        return (f"schedule.warmup_steps = {warmup} does not fit in {steps} steps: the warm-up takes {fitting}",)
    if by < 0 and warmup < 0 and fitting < _V3_WARMUP:
        return (f"schedule.warmup_steps is not set: the warm-up takes {fitting} of the {steps} steps",)
    return ()


def _section(name: str, values: dict[str, Any], default: Any) -> Any:
    """One table: `default` changed by it; checks that keys are known and values have the default's type."""
    defaults = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in defaults:
            raise ConfigError(f"[{name}] has no key {shorten(repr(key))}; there are {', '.join(defaults)}")
        want = type(defaults[key])
        if want is float and type(value) is int:
            value = _float(f"{name}.{key}", value)
        elif want is tuple and isinstance(value, list):
            value = tuple(_float(f"{name}.{key}", v) if type(v) is int else v for v in value)
        if type(value) is not want:
            raise ConfigError(f"{name}.{key} must be {want.__name__}, not {shorten(repr(value))}")
        checked[key] = _path("data.path", value) if (name, key) == ("data", "path") else value
    return dataclasses.replace(default, **checked)


def _float(key: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{key} is too large a number") from None


def _path(key: str, value: Any) -> str:
    """A path with `~` expanded."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key} must be the path of a folder, not {shorten(repr(value))}")
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        raise ConfigError(f"{key} = {value!r}: there is no such home directory") from None


def _begun(runs: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run of that name in `runs`, if it began with a checkpoint's weights; else nothing."""
    name = given.get("name")
    if runs is None or not isinstance(name, str) or not _is_folder_name(name):
        return {}
    path = runs / name / "config.toml"
    stored = _read(path) if path.is_file() else {}
    return stored if {"from", "model"} <= stored.keys() else {}


def _override(table: dict[str, Any], text: str) -> None:
    key, found, raw = text.partition("=")
    *sections, last = key.strip().split(".")
    if not found or not last:
        raise ConfigError(f"override {shorten(repr(text))} is not section.key=value")
    try:
        value = tomllib.loads(f"x = {raw}")["x"]
    except (ValueError, RecursionError):  # not TOML, or a number of thousands of digits
        value = raw  # a bare word is a string
    if key.strip() == "name" and not isinstance(value, str):
        value = raw.strip()  # a name may look like a number, such as 1e3
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {shorten(repr(text))}: {section} is not a table")
    table[last] = value
