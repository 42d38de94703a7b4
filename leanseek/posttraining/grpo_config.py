"""What a GRPO run is: the tables of `train`, with defaults for reinforcement learning, and [grpo] and [[rewards]]."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import tomli_w

from leanseek.config import ConfigError
from leanseek.errors import InputError
from leanseek.posttraining.losses import CLIPS, KLS, LOSSES, Rule
from leanseek.posttraining.rewards import RewardConfig, read_rewards, reward_tables
from leanseek.training.config import (
    BalanceConfig,
    DataConfig,
    MTPConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

CUT_OFF = ("mask", "penalty", "keep")


@dataclass(frozen=True)
class GRPOConfig:
    """The table [grpo]. `train.batch_size` is the number of completions of an optimizer step."""

    prompts: str = ""  # rows of JSON lines or parquet: {"prompt": text or messages, ...columns for the rewards}
    held_out: str = ""  # rows of the same kind, for pass_at_1; "": none
    group: int = 8  # completions of a prompt
    rollout_prompts: int = 0  # prompts of a rollout; 0: as many as a step trains on
    epochs: int = 1  # times that a rollout is trained on
    max_tokens: int = 64  # of a completion
    temperature: float = 1.0
    top_p: float = 1.0  # refused below 1: the sampler would draw from another distribution than the one trained
    top_k: int = 0  # refused above 0, as top_p
    loss: str = "dr"  # paper, dr, dapo, gspo
    divide_by_std: bool = False  # advantages, by the group's standard deviation; "paper" always does
    clip_low: float = 0.0  # 0: the loss's own
    clip_high: float = 0.0
    beta: float = 0.0  # of the KL to the reference, the policy as it was at step 0
    kl: str = ""  # k1 (in the reward), k2 or k3; "": k3 for "paper", else k2
    reference_every: int = 0  # the policy becomes the reference every so many steps; 0: never
    cut_off: str = "mask"  # answers that the limit ended: mask (not trained on), penalty (in the reward), keep
    penalty_tokens: int = 16  # before the limit, where the penalty begins
    refill: int = 0  # how often groups without spread are replaced by others; 0: they stay, with advantage 0
    speculate: int = -1  # MTP drafts of a rollout; -1: the engine's default
    streams: int = 64  # completions sampled at a time
    cache_gib: float = 0.25  # of the engine's cache, and at most as much for the states of a rollout
    solved_by: str = ""  # the reward that says whether an answer is right (above 0.5); "": the first
    pass_k: int = 0  # pass_at_k of held-out prompts besides pass_at_1; 0: none

    @property
    def rule(self) -> Rule:
        low, high = CLIPS[self.loss]
        kl = self.kl or ("k3" if self.loss == "paper" else "k2")
        return Rule(self.loss, self.clip_low or low, self.clip_high or high, self.beta, kl)


@dataclass(frozen=True)
class GRPORun(RunConfig):
    """Everything about a GRPO run. Raises ConfigError on contradictions."""

    data: DataConfig = field(default_factory=lambda: DataConfig(path="", seq_len=1, fim_rate=0.0))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, batch_size=128, spike_limit=0.0))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6, weight_decay=0.0))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            0, decay_start=1.0, decay_end=1.0, final_lr=0.0, last_start=1.0, last_lr=0.0
        )
    )
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(bias_update_speed=0.0, sequence_alpha=0.0))
    mtp: MTPConfig = field(default_factory=lambda: MTPConfig(weight=0.0, weight_late=0.0))
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rewards: tuple[RewardConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if problem := next(_problems(self), None):
            raise ConfigError(problem)

    @classmethod
    def _from_layers(cls, layers: list[dict[str, Any]]) -> Self:
        given = [layer["rewards"] for layer in layers if "rewards" in layer]
        run = super()._from_layers([{k: v for k, v in layer.items() if k != "rewards"} for layer in layers])
        try:
            return dataclasses.replace(run, rewards=read_rewards(given[-1]) if given else ())
        except InputError as error:
            raise ConfigError(str(error)) from None

    def to_toml(self) -> str:
        table = tomllib.loads(super().to_toml())
        if not self.data.path:
            del table["data"]["path"]
        return tomli_w.dumps(table | {"rewards": reward_tables(self.rewards)})

    @property
    def rollout_prompts(self) -> int:
        """Prompts of a rollout."""
        return self.grpo.rollout_prompts or self.train.batch_size // self.grpo.group

    @property
    def updates(self) -> int:
        """Optimizer steps on one rollout."""
        return self.grpo.epochs * (self.rollout_prompts * self.grpo.group // self.train.batch_size)


def _problems(run: GRPORun) -> Iterator[str]:
    """A line for each setting that cannot be."""
    g, t = run.grpo, run.train
    for key, choices in (("loss", LOSSES), ("kl", ("", *KLS)), ("cut_off", CUT_OFF)):
        if (value := getattr(g, key)) not in choices:
            yield f"grpo.{key} = {value!r} is not one of {', '.join(c for c in choices if c)}"
    if g.top_p != 1 or g.top_k:
        key, value, off = ("top_p", g.top_p, 1.0) if g.top_p != 1 else ("top_k", g.top_k, 0)
        yield (
            f"grpo.{key} = {value}: tokens would be drawn from another distribution than the one whose "
            f"log-probabilities are trained; set {key} = {off}"
        )
    if not 0 < g.temperature <= 100:
        yield f"grpo.temperature = {g.temperature} must lie in (0, 100]: completions of a group must differ"
    if not 2 <= g.group <= 128:
        yield f"grpo.group = {g.group} must lie between 2 and 128: an advantage compares completions of one prompt"
    for key in ("epochs", "max_tokens", "penalty_tokens", "streams"):
        if getattr(g, key) < 1:
            yield f"grpo.{key} = {getattr(g, key)} must be at least 1"
    for key in ("rollout_prompts", "clip_low", "clip_high", "beta", "reference_every", "refill", "pass_k"):
        if getattr(g, key) < 0:
            yield f"grpo.{key} = {getattr(g, key)} must not be negative"
    if g.clip_low >= 1:
        yield f"grpo.clip_low = {g.clip_low} must be below 1: ratios are positive"
    if g.cut_off == "penalty" and g.penalty_tokens > g.max_tokens:
        yield f"grpo.penalty_tokens = {g.penalty_tokens} exceeds grpo.max_tokens = {g.max_tokens}"
    if t.batch_size % g.group:
        yield f"train.batch_size = {t.batch_size} is not a multiple of grpo.group = {g.group}"
    if t.batch_size_start:
        yield "train.batch_size_start: the batch of a GRPO run does not grow; leave it at 0"
    if run.rollout_prompts * g.group % t.batch_size:
        yield (
            f"a rollout of {run.rollout_prompts} prompts x {g.group} completions is not a multiple of train.batch_size "
            f"= {t.batch_size}; change grpo.rollout_prompts"
        )
    if g.max_tokens >= run.model.max_position_embeddings:
        limit = run.model.max_position_embeddings
        yield f"grpo.max_tokens = {g.max_tokens} leaves no room for a prompt: the model goes to {limit} tokens"
    names = [reward.name for reward in run.rewards]
    if names and g.solved_by and g.solved_by not in names:
        yield f"grpo.solved_by = {g.solved_by!r} is the name of no reward; there are {', '.join(names)}"
    if run.parallel.pp * run.parallel.ep * run.parallel.cp > 1 or run.parallel.fsdp:
        yield "parallel: a GRPO run has the whole network in its process; leave pp, ep, cp and fsdp away"
    if run.balance.sequence_alpha or run.balance.switch_alpha:
        yield "balance.sequence_alpha and switch_alpha are losses of pre-training; leave them at 0 in a GRPO run"
