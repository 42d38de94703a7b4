"""A run that trains a reward model: `train` on pairs of answers, with [reward]."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from leanseek.checkpoint import find_tokenizer, resolve
from leanseek.checkpoint.training import Resumed
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.data.formats import DataError
from leanseek.posttraining.chat import Chats
from leanseek.posttraining.preferences import pair
from leanseek.posttraining.reward_model import Pairwise, packed, score_samples
from leanseek.posttraining.rows import read_rows
from leanseek.training import Summary, Trainer, train
from leanseek.training.config import (
    BalanceConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from leanseek.training.feed import Evaluation, Feed
from leanseek.training.part import Part
from leanseek.training.resume import check_kept
from leanseek.training.schedules import batch_size
from leanseek.training.trainer import compute_dtype

Pair = tuple[list[int], list[int]]  # ids of the chosen and of the rejected answer, each with its prompt


@dataclass(frozen=True)
class RewardSection:
    """The table [reward]."""

    epochs: float = 1.0  # passes over the pairs, which set train.steps; 0: train.steps is given
    held_out: str = ""  # pairs to validate on; "": none


@dataclass(frozen=True)
class RewardRun(RunConfig):
    """`data.path`: rows {"prompt", "chosen", "rejected"}. `train.batch_size` counts pairs, `data.seq_len` is that of
    the longest answer with its prompt.

    Raises ConfigError on contradictions.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig(path="", seq_len=2048, fim_rate=0.0))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=32, spike_limit=0.0))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            warmup_steps=0, decay_start=0.0, decay_end=1.0, final_lr=0.0, last_start=1.0, last_lr=0.0
        )
    )
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(bias_update_speed=0.0, sequence_alpha=0.0))
    reward: RewardSection = field(default_factory=RewardSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.path:
            raise ConfigError('set data.path to the pairs: rows {"prompt", "chosen", "rejected"}')
        if not 0 <= self.reward.epochs <= 10_000:
            raise ConfigError(f"reward.epochs = {self.reward.epochs} must lie in [0, 10000]")
        if self.data.fim_rate:
            raise ConfigError("data.fim_rate is for texts; leave it at 0")

    @classmethod
    def _from_layers(cls, layers: list[dict[str, Any]]) -> Self:
        scalar = {"num_labels": 1, "num_nextn_predict_layers": 0}
        more = [{"model": scalar}] if any("model" in layer for layer in layers) else []
        return super()._from_layers([*layers, *more])


def train_reward(
    run: RewardRun, *, resume: bool = False, runs: Path = Path("runs"), part: Part | None = None, **options: Any
) -> Summary:
    """Train a reward model to the last step; arguments and errors as those of `train`."""
    part = part or Part()
    feed = PairFeed(run, part)
    if run.reward.epochs:
        steps = feed.steps(run.reward.epochs)
        feed.run = run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))
    return train(run, resume=resume, runs=runs, part=part, feed=lambda *_: feed, **options)


class PairFeed(Feed):
    """The pairs of `data.path` in an order of each epoch's own, a row each.

    Raises:
        DataError: a row is no pair, or too long.
        ConfigError: there is no tokenizer, or the model's vocabulary is too small for it.
    """

    def __init__(self, run: RewardRun, part: Part):
        self.run, self.part = run, part
        found = find_tokenizer(resolve(run.source)) if run.source else None
        if found is None:
            raise ConfigError("pairs are encoded by the tokenizer of the model to start from: set from = ...")
        self.folder = found
        chats = Chats(found)
        self.special = chats.special
        if (ids := chats.tokenizer.inner.get_vocab_size()) > run.model.vocab_size:
            raise ConfigError(f"model.vocab_size = {run.model.vocab_size}, but the tokenizer in {found} has {ids} ids")
        self.pairs = _encoded(chats, Path(run.data.path).expanduser(), run.data.seq_len)
        held_out = run.reward.held_out
        self.held_out = _encoded(chats, Path(held_out).expanduser(), run.data.seq_len) if held_out else []
        chats.close()
        self.objective = self._pairwise = Pairwise(compute_dtype(run, torch.device("cpu")), run.train.recompute)
        self.taken = self.tokens = 0
        self._epoch, self._order = -1, list[int]()
        self.words = f"{len(self.pairs):,} pairs{'' if held_out else '; none is held out, so there is no validation'}"

    def steps(self, epochs: float) -> int:
        """Steps of `epochs` passes, the last perhaps going on into the next."""
        pairs, steps = epochs * len(self.pairs), 0
        while pairs > 1e-6:
            pairs -= batch_size(self.run, steps)
            steps += 1
        return steps

    def attach(self, trainer: Trainer) -> None:
        self._pairwise.dtype = trainer.dtype

    def batch(self, step: int) -> Batch:
        size = batch_size(self.run, step)
        places = [self._place(self.taken + i) for i in range(size)]
        self.taken += size
        self.tokens += sum(len(ids) for place in places for ids in self.pairs[place])
        own = self.part.share(size)
        rows = [self.pairs[place] for place in places[own.start : own.stop]] or [self.pairs[places[0]]]
        tokens, lengths = packed(rows, self.run.model.lookahead)
        return Batch(tokens, size, lengths)

    def _place(self, number: int) -> int:
        """Which pair comes at a place of the endless stream of epochs."""
        epoch, place = divmod(number, len(self.pairs))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed((self.run.train.seed << 20) + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.pairs), generator=generator).tolist()
        return int(self._order[place])

    def evaluate(self, trainer: Trainer, step: int) -> Evaluation | None:
        """Loss and accuracy on held-out pairs."""
        if not self.held_out:
            return None
        own = self.part.share(len(self.held_out))
        pairs = self.held_out[own.start : own.stop]
        found = torch.tensor(score_samples(trainer.model, [ids for pair in pairs for ids in pair]), dtype=torch.float64)
        margins = found[0::2] - found[1::2]
        sums = torch.stack((-torch.nn.functional.logsigmoid(margins).sum(), (margins > 0).double().sum()))
        loss, right = (self.part.total(sums) / len(self.held_out)).tolist()
        figures = {"val_loss": loss, "val_accuracy": right}
        return Evaluation(figures, f"validation loss {loss:.4f}, {right:.1%} of {len(self.held_out):,} pairs right")

    def state(self) -> dict[str, Any]:
        return {"rows": self.taken, "tokens": self.tokens, "data": self._size()}

    def _size(self) -> list[int]:
        return [len(self.pairs), sum(len(ids) for pair in self.pairs for ids in pair)]

    def resume(self, then: Any, found: Resumed) -> list[str]:
        check_kept(then, self.run, {"train.seed": "the order"})
        if found.state.get("data") != self._size():
            raise ConfigError(f"{self.run.data.path} holds other pairs than those that the run began with")
        self.taken, self.tokens = found.state["rows"], found.state["tokens"]
        return []


def _encoded(chats: Chats, path: Path, longest: int) -> list[Pair]:
    pairs: list[Pair] = []
    for row, where in read_rows(path):
        if not {"chosen", "rejected"} <= row.keys():
            raise DataError(f"{where}: a pair has prompt, chosen and rejected")
        chosen, rejected = pair(chats, row, where)
        each = chosen.ids, rejected.ids
        if each[0] == each[1]:
            raise DataError(f"{where}: chosen and rejected are the same; leave the row out")
        if (length := max(map(len, each))) > longest:
            raise DataError(f"{where} has an answer of {length:,} tokens with its prompt; data.seq_len is {longest:,}")
        pairs.append(each)
    if not pairs:
        raise DataError(f"{path} has no rows")
    return pairs
