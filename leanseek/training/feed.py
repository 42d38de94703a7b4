"""Where the batches of a run come from: token shards, in pre-training.

A run's place in its data is saved with every checkpoint, so that a resumed run gets the batches it would have got.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from leanseek.checkpoint.training import Resumed
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.data.loader import TokenDataset
from leanseek.tokens import SpecialTokens
from leanseek.training.config import RunConfig
from leanseek.training.objective import Objective
from leanseek.training.part import Part
from leanseek.training.resume import Position, check_data, position, size
from leanseek.training.schedules import batch_size
from leanseek.training.trainer import Trainer


class Evaluation(NamedTuple):
    figures: dict[str, Any]  # for a row of metrics.jsonl
    line: str  # for who watches


class Feed:
    """What the loop asks of what feeds it. Every rank has one, and gets its own rows."""

    objective: Objective | None = None  # what the run minimises; None: the next token's loss
    folder: Path  # has the tokenizer that checkpoints keep
    special: SpecialTokens
    tokens: int  # trained on so far
    words: str = ""  # what is unusual about it, for the run's first line

    def attach(self, trainer: Trainer) -> None:
        """Called once the trainer has its weights, before the first batch and after `resume`."""

    def batch(self, step: int) -> Batch:
        """This part's rows of step `step`, which follow those of the call before."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """What the latest batch adds to its step's row of metrics.jsonl."""
        return {}

    def evaluate(self, trainer: Trainer, step: int) -> Evaluation | None:
        """How good the weights after `step` steps are; None where nothing is held out."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Its place, as JSON, for a checkpoint; all ranks' are the same."""
        raise NotImplementedError

    def resume(self, then: RunConfig, found: Resumed) -> list[str]:
        """Go to the place that a checkpoint of the run `then` has stored. Returns a line for each thing that could not
        be kept exactly.

        Raises:
            ConfigError: that place does not exist here.
        """
        raise NotImplementedError


class TokenFeed(Feed):
    """Windows of the shards in `data.path`.

    Raises:
        DataError: the shards are unusable.
        ConfigError: the model's vocabulary is too small for them.
    """

    def __init__(self, run: RunConfig, part: Part):
        self.run, self.part = run, part
        path, length, ahead = Path(run.data.path), run.data.seq_len, run.model.lookahead
        self.data = TokenDataset(path, "train", length, ahead, run.train.seed, run.data.fim_rate)
        ids = len(self.data.token_bytes)
        if run.model.vocab_size < ids:
            raise ConfigError(f"model.vocab_size = {run.model.vocab_size}, but the tokenizer in {path} has {ids} ids")
        self.held_out = TokenDataset(path, "validation", length, ahead)
        self.folder, self.special = path, self.data.special
        self.words = self._words()
        self.position = Position(0, 0)

    def _words(self) -> str:
        if not self.held_out.samples_per_epoch:
            return "the shards hold out nothing, so there is no validation"
        length = self.held_out.seq_len
        return (
            f"validation is one window of {length} tokens, all that is held out" if length < self.data.seq_len else ""
        )

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.position.tokens

    def batch(self, step: int) -> Batch:
        size = batch_size(self.run, step)
        own = self.part.share(size)
        batch = self.data.batch(self.position.samples + own.start, len(own))
        self.position = self.position.after(size, self.run.data.seq_len)
        return dataclasses.replace(batch, sequences=size)

    def evaluate(self, trainer: Trainer, step: int) -> Evaluation | None:
        """Loss over a fixed part of the held-out split, also in bits per byte, comparable across tokenizers."""
        if not self.held_out.samples_per_epoch:
            return None
        sums, length, t = torch.zeros(4, dtype=torch.float64), self.held_out.seq_len, self.run.train
        micro = t.micro_batch_size or t.batch_size
        for batch in self.held_out.in_order(micro * self.part.replicas, t.eval_sequences):
            own = self.part.share(len(batch))
            rows = batch.rows(own.start, own.stop) if own else batch.rows(0, 1)  # with the others, in any case
            read = int(self.held_out.token_bytes[rows.tokens[:, 1 : length + 1]].sum()) if own else 0
            sums += torch.tensor([*trainer.evaluate(rows), read], dtype=torch.float64) * bool(own)
        nll, mtp, targets, read = self.part.total(sums).tolist()
        loss, bits = nll / targets, nll / math.log(2) / read
        figures = {"val_loss": loss, "val_bits_per_byte": bits}
        if self.run.model.num_nextn_predict_layers:
            figures["val_mtp_loss"] = mtp / targets
        return Evaluation(figures, f"validation loss {loss:.4f}, {bits:.4f} bits per byte")

    def state(self) -> dict[str, Any]:
        return {"samples": self.position.samples, "tokens": self.position.tokens, "data": size(self.data)}

    def resume(self, then: RunConfig, found: Resumed) -> list[str]:
        check_data(then, self.run, self.data, found)
        self.position, lines = position(then, self.run, self.data, found)
        return lines
