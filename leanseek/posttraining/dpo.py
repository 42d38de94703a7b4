"""Direct preference optimisation (arXiv 2305.18290): −log σ(β · [log π(y₊)/π₀(y₊) − log π(y₋)/π₀(y₋)]).

A row is a pair: the chosen answer after its prompt, then the rejected one after the same. π₀ are the weights at the
start; their log-probabilities are computed once, before the first step, and kept in the run's folder.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.model import Transformer, without_padding
from leanseek.posttraining.packing import SampleDataset
from leanseek.posttraining.sft import ChatFeed
from leanseek.posttraining.sft_config import SFTConfig
from leanseek.training import Trainer
from leanseek.training.feed import Evaluation
from leanseek.training.objective import Losses
from leanseek.training.part import Part
from leanseek.writing import replace_file

REFERENCE = "reference-{}.npy"  # of a split: [pairs, 2] float32
CHUNK = 256  # positions whose logits live at a time


class Preference:
    """The objective. `weights` are 1 where something is learned; the column `reference` [B, 2] is π₀'s. MTP modules
    stay as they are."""

    stages = False

    def __init__(self, run: SFTConfig):
        self.run = run
        self.margins: list[Tensor] = []  # of the pairs of the step
        self.dtype = torch.float32

    def __call__(
        self, model: Transformer, batch: Batch, step: int, hidden: Tensor | None = None, stage: int = 0
    ) -> Losses:
        states, routes = self._hidden(model, batch)
        with torch.no_grad():
            margins = self._margins(answers_logps(model, states.detach(), batch), batch.columns["reference"])
            # the slope of the loss in an answer's log-probability is that in each of its tokens'
            slope = -self.run.sft.beta * torch.sigmoid(-margins) * batch.share / len(batch)
            weights = -spread(torch.stack((slope, -slope), 1), batch)
        loss = -F.logsigmoid(margins).mean() * batch.share
        self.margins.append(margins)
        surrogate = model.head(
            states, *_targets(batch, weights, states.shape[1])
        )  # Σ weight · −log p: its gradient is the loss's
        nothing = loss.new_zeros(())
        return Losses(surrogate, loss, nothing, nothing, without_padding(routes, batch.lengths or ()), None)

    def _hidden(self, model: Transformer, batch: Batch) -> tuple[Tensor, list[Any]]:
        inputs = batch.tokens[:, : -model.config.lookahead]
        return model.hidden(inputs, dtype=self.dtype, recompute=self.run.train.recompute, lengths=batch.lengths)

    def _margins(self, logps: Tensor, reference: Tensor) -> Tensor:
        chosen, rejected = (logps - reference).unbind(1)
        return self.run.sft.beta * (chosen - rejected)

    @torch.no_grad()
    def reference(self, model: Transformer, batch: Batch) -> Tensor:
        """The log-probability of each answer, [B, 2]."""
        return answers_logps(model, self._hidden(model, batch)[0], batch)

    def figures(self) -> dict[str, float]:
        """Of the pairs since the last call."""
        margins, self.margins = torch.cat(self.margins), []
        return {"reward_margin": float(margins.mean()), "reward_accuracy": float((margins > 0).float().mean())}


def answers_logps(model: Transformer, hidden: Tensor, batch: Batch) -> Tensor:
    """Σ log p over what is learned of each answer, [B, 2] float32, without a gradient; hidden [B, T, D]."""
    assert batch.weights is not None
    numbers = spread(torch.arange(2.0 * len(batch)).view(-1, 2), batch).long()  # [B, T + lookahead]
    targets, weights = _targets(batch, batch.weights, hidden.shape[1])
    places = weights.flatten().nonzero().squeeze(1)
    owner = numbers[:, 1 : 1 + targets.shape[1]].flatten()[places]
    found = torch.zeros(2 * len(batch), device=hidden.device)
    for part, of in zip(places.split(CHUNK), owner.split(CHUNK), strict=True):
        logits = model.head(hidden.flatten(0, 1)[part]).float()
        logp = logits.gather(1, targets.flatten()[part, None]).squeeze(1) - logits.logsumexp(-1)
        found += F.one_hot(of, len(found)).float().t() @ logp
    return found.view(-1, 2)


def spread(each: Tensor, batch: Batch) -> Tensor:
    """A value of every answer [B, 2] at the tokens learned of it: [B, T + lookahead]."""
    assert batch.weights is not None and batch.lengths is not None
    out = torch.zeros_like(batch.weights)
    for row, (first, second) in enumerate(batch.lengths):
        out[row, :first], out[row, first : first + second] = each[row]
    return out * batch.weights


def _targets(batch: Batch, weights: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Targets [B, T] and their weights. An answer's first token is not learned, so none lies across its end."""
    return batch.tokens[:, 1 : 1 + length], weights[:, 1 : 1 + length]


class PreferenceFeed(ChatFeed):
    """Pairs, in an order of each epoch; `train.batch_size` counts them."""

    kind = "preference"

    def __init__(self, run: SFTConfig, part: Part, folder: Path, path: Path):
        if part.ranks > 1:
            raise ConfigError("preferences are trained on by one process; leave --nproc and [parallel] away")
        super().__init__(run, part, folder, path)
        self.preference = self.objective = Preference(run)
        self.references: dict[int, Tensor] = {}  # by dataset

    def attach(self, trainer: Trainer) -> None:
        """The reference: of the weights at the start, or what a run that is resumed has kept of them."""
        super().attach(trainer)
        self.preference.dtype = trainer.dtype
        for name, data in (("train", self.data), ("validation", self.held_out)):
            path = self.out / REFERENCE.format(name)
            if not self.taken:
                self._keep(path, trainer, data)
            elif not path.is_file():
                raise ConfigError(f"{path} is gone, without which the run cannot go on; start a new run")
            self.references[id(data)] = torch.from_numpy(np.load(path, allow_pickle=False))

    def _keep(self, path: Path, trainer: Trainer, data: SampleDataset) -> None:
        size, found = self.run.train.micro_batch_size or self.run.train.batch_size, [torch.zeros(0, 2)]
        pairs = [[i, i + 1] for i in range(0, len(data), 2)]
        for first in range(0, len(pairs), size):
            batch = data.batch(pairs[first : first + size], self.run.model.lookahead).to(trainer.device)
            found.append(self.preference.reference(trainer.model, batch).cpu())
        content = io.BytesIO()
        np.save(content, torch.cat(found).numpy())
        replace_file(path, content.getvalue())

    def _pack(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self.run.train.seed, epoch]).permutation(len(self.data) // 2)
        return [[2 * pair, 2 * pair + 1] for pair in order.tolist()]

    def _batch(self, data: SampleDataset, rows: list[list[int]]) -> Batch:
        batch = data.batch(rows, self.run.model.lookahead)
        places = torch.tensor([row[0] // 2 for row in rows])
        return dataclasses.replace(batch, columns={"reference": self.references[id(data)][places]})

    def batch(self, step: int) -> Batch:
        rows = self._next_rows(step)
        return self._batch(self.data, rows)

    def evaluate(self, trainer: Trainer, step: int) -> Evaluation | None:
        """Loss and accuracy on held-out pairs."""
        pairs = [[i, i + 1] for i in range(0, len(self.held_out), 2)][: self.run.train.eval_sequences]
        if not pairs:
            return None
        kept, loss, size = self.preference.margins, 0.0, self.run.train.micro_batch_size or self.run.train.batch_size
        self.preference.margins = []
        for first in range(0, len(pairs), size):
            rows = pairs[first : first + size]
            loss += trainer.evaluate(self._batch(self.held_out, rows))[0] * len(rows) / len(pairs)
        figures = self.preference.figures()
        self.preference.margins = kept
        found = {"val_loss": loss, **{f"val_{name}": value for name, value in figures.items()}}
        return Evaluation(found, f"validation loss {loss:.4f}, accuracy {figures['reward_accuracy']:.1%} of pairs")
