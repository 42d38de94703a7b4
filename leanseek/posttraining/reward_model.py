"""Reward models (5.2.1): a scalar on the last token of an answer, learned from pairs of a chosen and a rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek import checkpoint, ops
from leanseek.data.batch import Batch
from leanseek.errors import InputError
from leanseek.machine.device import default_device
from leanseek.model import Lengths, Route, Transformer, without_padding
from leanseek.posttraining.chat import Chats, Message
from leanseek.training.objective import Losses

AT_ONCE = 8192  # tokens that are scored together


def scores(
    model: Transformer,
    tokens: Tensor,
    lengths: Lengths,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> tuple[Tensor, list[Route]]:
    """A score of each sample packed into rows of tokens [B, T] int64, in order: [samples] float32; and the routes.

    What follows a sample's last token, padding or another sample, has no part in its score.
    """
    hidden, routes = model.hidden(tokens, dtype=dtype, recompute=recompute, lengths=lengths)
    ends = [row * tokens.shape[1] + end for row, each in enumerate(lengths) for end in _ends(each)]
    last = hidden.flatten(0, 1).index_select(0, torch.tensor(ends, device=tokens.device))  # [samples, D]
    weight = model.get_parameter("score.weight")
    return ops.linear(last.float(), weight.float())[:, 0], routes


def _ends(lengths: Sequence[int]) -> list[int]:
    """The place of the last token of each sample in a row."""
    return [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]


def packed(rows: Sequence[Sequence[list[int]]], more: int = 0) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """Rows of samples' ids as tokens [B, T + more] int64, padded at the right, and the samples' lengths."""
    lengths = tuple(tuple(len(ids) for ids in row) for row in rows)
    tokens = torch.zeros(len(rows), max(map(sum, lengths)) + more, dtype=torch.int64)
    for place, row in enumerate(rows):
        flat = [token for ids in row for token in ids]
        tokens[place, : len(flat)] = torch.tensor(flat)
    return tokens, lengths


class Pairwise:
    """−log σ(chosen − rejected), the mean over the pairs of a step. Each row of a batch is a pair: chosen, rejected.

    Computes in `dtype`; the score itself in float32.
    """

    stages = False

    def __init__(self, dtype: torch.dtype, recompute: bool = False):
        self.dtype, self.recompute = dtype, recompute
        self.pairs, self.right, self.margin = 0, 0.0, 0.0

    def __call__(
        self, model: Transformer, batch: Batch, step: int, hidden: Tensor | None = None, stage: int = 0
    ) -> Losses:
        assert batch.lengths is not None
        inputs = batch.tokens[:, : -model.config.lookahead]
        found, routes = scores(model, inputs, batch.lengths, self.dtype, self.recompute)
        margins = found[0::2] - found[1::2]  # [pairs]
        share = 1 / batch.sequences if batch.sequences else 0.0
        loss = -F.logsigmoid(margins).sum() * share
        nothing = torch.zeros((), device=loss.device)
        if torch.is_grad_enabled() and batch.sequences:
            self.pairs += len(margins)
            self.right += float((margins > 0).sum())
            self.margin += float(margins.detach().sum())
        return Losses(loss, loss, nothing, nothing, without_padding(routes, batch.lengths), None)

    def figures(self) -> dict[str, float]:
        """Of this process's pairs since the last call."""
        pairs = max(1, self.pairs)
        found = {"accuracy": self.right / pairs, "margin": self.margin / pairs}
        self.pairs, self.right, self.margin = 0, 0.0, 0.0
        return found


class RewardModel:
    """A trained reward model, with which to score answers.

    Raises:
        InputError: the folder holds no reward model, or no tokenizer.
    """

    def __init__(self, path: str | Path):
        folder = checkpoint.resolve(path)
        if not checkpoint.read_config(folder).num_labels:
            raise InputError(f"{folder} is no reward model: it has no score.weight; train one with `leanseek reward`")
        if (tokenizer := checkpoint.find_tokenizer(folder)) is None:
            raise InputError(f"{folder} has no tokenizer.json")
        self.device = default_device()
        self.model = checkpoint.load(folder, self.device).requires_grad_(False)
        self._chats = Chats(tokenizer)

    def score(self, prompts: Sequence[str | list[Message]], completions: Sequence[str | list[Message]]) -> list[float]:
        """Raises InputError if an answer is longer than the model's window."""
        samples = [self._chats.answered(*both)[-1].ids for both in zip(prompts, completions, strict=True)]
        most = self.model.config.max_position_embeddings
        if long := next((len(ids) for ids in samples if len(ids) > most), 0):
            raise InputError(f"an answer with its prompt has {long:,} tokens; the reward model's window is {most:,}")
        return score_samples(self.model, samples)


@torch.no_grad()
def score_samples(model: Transformer, samples: Sequence[list[int]]) -> list[float]:
    """The scores of samples of ids. A score is the same to the bit, whatever is scored with it."""
    found = [0.0] * len(samples)
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
    first = 0
    while first < len(order):
        stop = first + 1
        while stop < len(order) and (stop + 1 - first) * len(samples[order[stop]]) <= AT_ONCE:
            stop += 1
        tokens, lengths = packed([[samples[i]] for i in order[first:stop]])
        with ops.row_invariant():
            each, _ = scores(model, tokens.to(model.embed_tokens.weight.device), lengths)
        for place, value in zip(order[first:stop], each.tolist(), strict=True):
            found[place] = value
        first = stop
    return found
