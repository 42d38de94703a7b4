"""What a run of SFT is: the tables of `train`, with defaults for fine-tuning, and [sft]."""

from __future__ import annotations

from dataclasses import dataclass, field

from leanseek.config import ConfigError
from leanseek.training.config import (
    BalanceConfig,
    DataConfig,
    MTPConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class SFTSection:
    """The table [sft]."""

    epochs: float = 2.0  # passes over the chats, which set train.steps; 0: train.steps is given
    too_long: str = "refuse"  # a sample longer than data.seq_len: refuse, or cut its end off
    samples: int = 4  # held-out prompts that each evaluation answers
    max_tokens: int = 128  # of such an answer
    temperature: float = 0.0
    beta: float = 0.1  # of DPO, on preferences


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """`data.path`: a folder of `leanseek data prepare --chat`. `data.seq_len` is the length of a row of packed samples,
    and `train.batch_size` counts rows, of preferences pairs.

    Raises ConfigError on contradictions.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig(seq_len=2048, fim_rate=0.0))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(spike_limit=0.0))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))  # 5.1
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            warmup_steps=0, decay_start=0.0, decay_end=1.0, final_lr=1e-6, last_start=1.0, last_lr=1e-6
        )
    )
    # the balance is pre-training's; its last tokens had γ = 0 too (4.2)
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(bias_update_speed=0.0))
    mtp: MTPConfig = field(default_factory=lambda: MTPConfig(weight=0.1, weight_late=0.1))
    sft: SFTSection = field(default_factory=SFTSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        s = self.sft
        if self.data.fim_rate:
            raise ConfigError("data.fim_rate is for texts; leave it at 0")
        for key, fits, rule in (
            ("epochs", 0 <= s.epochs <= 10_000, "must lie in [0, 10000]"),
            ("too_long", s.too_long in ("refuse", "cut"), "is neither refuse nor cut"),
            ("samples", 0 <= s.samples <= 1000, "must lie in [0, 1000]"),
            ("max_tokens", 1 <= s.max_tokens <= 2**20, "must lie in [1, 1048576]"),
            ("temperature", 0 <= s.temperature <= 10, "must lie in [0, 10]"),
            ("beta", s.beta > 0, "must be positive"),
        ):
            if not fits:
                raise ConfigError(f"sft.{key} = {getattr(s, key)!r} {rule}")
