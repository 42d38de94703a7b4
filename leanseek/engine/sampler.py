"""Turns logits into tokens: adjusts them (penalties, biases, masks) and samples, all rows of a step at once.

The noise depends only on the request's seed and the token's position, with one number per token id (Gumbel-max: argmax
of log p + noise has the distribution p). So neither the batch nor speculation changes what a request samples: a draft
is made with the same noise, and kept if the model itself chooses that token at that position. Compare Daliri et al.,
"Coupling without communication and drafter-invariant speculative decoding" (arXiv 2408.07978).
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from leanseek import ops
from leanseek.engine.outputs import TokenLogprob
from leanseek.engine.params import SamplingParams
from leanseek.engine.sequence import Sequence

# ---- the rows of a step: on the host, before the model runs ----


@dataclass
class Rows:
    """The rows of a step to sample. `add` takes one sequence at a time; if it fails, the others are unaffected."""

    sequences: list[Sequence] = field(default_factory=list)
    first: list[int] = field(default_factory=list)  # first row of each sequence, which has one row more than drafts
    count: int = 0
    greedy: bool = True  # whether all rows are
    masks: list[tuple[int, np.ndarray]] = field(default_factory=list)
    penalised: list[tuple[int, np.ndarray, float]] = field(default_factory=list)  # row, ids, repetition penalty
    added: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)  # row, ids, values to add

    def __len__(self) -> int:
        return self.count

    def add(self, sequence: Sequence) -> None:
        """Add rows for the next token and the one after each draft; drop drafts that the grammar forbids."""
        if sequence.adjusts:
            self._restrict(sequence)
        self.greedy &= sequence.greedy
        self.sequences.append(sequence)
        self.first.append(self.count)
        self.count += 1 + len(sequence.drafts)

    def choice(self, vocab_size: int, device: torch.device) -> Choice | None:
        """How to sample each row; None if all are greedy."""
        if self.greedy:
            return None
        rows = [(s, len(s.tokens) + j) for s in self.sequences for j in range(len(s.drafts) + 1)]
        keys = [0 if s.greedy else s.key(position) for s, position in rows]
        return Choice.of([s.params for s, _ in rows], keys, vocab_size, device)

    def _restrict(self, sequence: Sequence) -> None:
        masks = sequence.matcher.masks(sequence.drafts) if sequence.matcher else []
        if masks:
            del sequence.drafts[len(masks) - 1 :]
        rows = sequence.penalties.rows(sequence.tokens, sequence.drafts) if sequence.penalties else []
        for row, (seen, ids, values) in enumerate(rows, start=self.count):
            if len(seen):
                self.penalised.append((row, seen, sequence.params.repetition_penalty))
            if len(ids):
                self.added.append((row, ids, values))
        self.masks += enumerate(masks, start=self.count)


def adjust(logits: Tensor, rows: Rows) -> Tensor:
    """logits [R, V] with each row's masks, penalties and biases applied; the same tensor if there are none."""
    if not (rows.masks or rows.penalised or rows.added):
        return logits
    logits, device = logits.clone(), logits.device
    if rows.penalised:
        row, ids = _flat([(r, ids) for r, ids, _ in rows.penalised], device)
        penalty = np.repeat([p for *_, p in rows.penalised], [len(ids) for _, ids, _ in rows.penalised])
        factor = torch.from_numpy(penalty.astype(np.float32)).to(device)
        value = logits[row, ids]
        logits[row, ids] = torch.where(value > 0, value / factor, value * factor)
    if rows.added:
        row, ids = _flat([(r, ids) for r, ids, _ in rows.added], device)
        logits[row, ids] += torch.from_numpy(np.concatenate([v for *_, v in rows.added])).to(device)
    if rows.masks:
        row = torch.tensor([r for r, _ in rows.masks], device=device)
        bits = np.stack([mask for _, mask in rows.masks])
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]]
        logits[row] = logits[row].masked_fill(torch.from_numpy(allowed).to(device) == 0, -math.inf)
    return logits


def _flat(parts: list[tuple[int, np.ndarray]], device: torch.device) -> tuple[Tensor, Tensor]:
    row = np.repeat([row for row, _ in parts], [len(ids) for _, ids in parts])
    ids = np.concatenate([ids for _, ids in parts])
    return torch.from_numpy(row).to(device), torch.from_numpy(ids).to(device)


# ---- sampling ----


class Choice(ops.Choice):
    """How to sample each row, from the requests' parameters."""

    @staticmethod
    def of(params: Listing[SamplingParams], keys: Listing[int], vocab_size: int, device: torch.device) -> Choice | None:
        """None if every row is greedy."""
        if all(p.greedy for p in params):
            return None
        values = torch.tensor([(p.temperature * (not p.greedy), p.top_p, p.min_p) for p in params])
        temperature, top_p, min_p = values.to(device).unbind(1)
        top_k = [min(p.top_k or vocab_size, vocab_size) for p in params]
        return Choice(
            temperature=temperature,
            top_k=torch.tensor(top_k, device=device),
            top_p=top_p,
            min_p=min_p,
            keys=as_keys(keys, device),
        )


def as_keys(keys: Listing[int] | Listing[list[int]], device: torch.device) -> Tensor:
    """Unsigned 64-bit numbers as an int64 tensor with the same bits."""
    return torch.from_numpy(np.array(keys, dtype=np.uint64).astype(np.int64)).to(device)


def choose(logits: Tensor, choice: Choice | None) -> Tensor:
    """logits [R, V] float32 -> tokens [R] int64, always within the vocabulary."""
    if choice is not None:
        return ops.sample(logits, choice)
    if logits.device.type == "cpu":  # torch would wake its threads for microseconds of work
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


# ---- logprobs ----


def logprobs_of(logits: Tensor, tokens: Tensor, alternatives: int) -> list[TokenLogprob]:
    """Logprobs of tokens [R] under logits [R, V], each with the most likely `alternatives`."""
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(1, tokens[:, None]).squeeze(1).tolist()
    values, ids = log_p.topk(alternatives, dim=-1)
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*each) for each in zip(tokens.tolist(), chosen, tops, strict=True)]
