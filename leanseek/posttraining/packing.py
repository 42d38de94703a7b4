"""Samples of a shard folder, packed into rows: a pure function of (seed, epoch), so a place in it is one integer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from leanseek.data.batch import Batch
from leanseek.data.formats import DataError
from leanseek.data.shards import LEARNED, Shards
from leanseek.data.tokenizer import load_tokenizer
from leanseek.tokens import special_tokens


class SampleDataset:
    """One split of a folder of chats or preferences, memory-mapped.

    size: most tokens of a row. cut: longer samples lose their end; else they are refused. One of which nothing that is
    learned would be left is left out; `cut` and `dropped` count both.

    Raises:
        DataError: the folder is not finished or damaged, or holds something else; or a sample is too long.
    """

    def __init__(self, folder: Path, split: str, size: int, cut: bool = False, kind: str = "chat"):
        self.folder, self.size = folder, size
        stored, begin, end, shard = Shards(folder, kinds=(kind,)), [0], [0], [0]
        self.shards: list[np.ndarray] = []
        for number, entry in enumerate(stored.entries):
            if getattr(entry, split).documents:
                tokens, ends = stored.open(number, split)
                begin += [0, *ends[:-1]]
                end += [*ends]
                shard += [len(self.shards)] * len(ends)
                self.shards.append(tokens)
        stored.keep_stamps()
        self.begin, self.lengths, self.shard = (np.array(x[1:], np.int64) for x in (begin, end, shard))
        self.lengths -= self.begin
        self.token_bytes = stored.token_bytes
        self.special = special_tokens(load_tokenizer(folder), folder)
        longer = self.lengths > size
        if longer.any() and not cut:
            raise DataError(
                f"{folder}: {int(longer.sum()):,} of {len(longer):,} {split} samples are longer than data.seq_len = "
                f'{size}, the longest {int(self.lengths.max()):,} tokens; raise it, or cut them: sft.too_long = "cut"'
            )
        self.lengths = np.minimum(self.lengths, size)
        self.learned = np.array([int(self._of(i)[1].sum()) for i in range(len(self.lengths))], np.int64)
        self.cut, kept = int(longer.sum()), self.learned > 0
        if kind == "preference":  # both of a pair or none
            kept = np.repeat(kept.reshape(-1, 2).all(1), 2)
        self.dropped = int((~kept).sum())
        if self.dropped:
            names = ("begin", "lengths", "shard", "learned")
            for name in names:
                setattr(self, name, getattr(self, name)[kept])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def _of(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a sample and which are learned."""
        begin = self.begin[sample]
        found = self.shards[self.shard[sample]][begin : begin + self.lengths[sample]]
        return (found & np.uint32(LEARNED - 1)).astype(np.int64), found >= LEARNED

    def prompt(self, sample: int) -> list[int]:
        """What comes before the first answer."""
        ids, learned = self._of(sample)
        return ids[: int(learned.argmax())].tolist()

    def batch(self, rows: list[list[int]], lookahead: int, whole: list[list[int]] | None = None) -> Batch:
        """Rows of samples; `whole`: those of all ranks, by which the loss is a mean over what is learned.

        Without `whole` the loss is a sum.
        """
        width = max(int(self.lengths[row].sum()) for row in (whole or rows))
        pad = self.special.eos[0]  # no matter: what is learned is known by its place, not by its id
        tokens = np.full((len(rows), width + lookahead), pad, np.int64)
        weights = np.zeros(tokens.shape, np.float32)
        share = 1.0 / float(sum(self.learned[row].sum() for row in whole)) if whole else 1.0
        for into, weigh, row in zip(tokens, weights, rows, strict=True):
            place = 0
            for sample in row:
                ids, learned = self._of(sample)
                into[place : place + len(ids)] = ids
                weigh[place : place + len(ids)] = learned * share
                place += len(ids)
        lengths = tuple(tuple(self.lengths[row].tolist()) for row in rows)
        return Batch(torch.from_numpy(tokens), len(whole or rows), lengths, torch.from_numpy(weights))

    def epoch(self, seed: int, number: int) -> list[list[int]]:
        """All samples in rows, in an order of their own. Every epoch has as many rows."""
        rng = np.random.default_rng([seed, number])
        rows = pack(self.lengths, self.size, rng.permutation(len(self)))
        return [rows[i] for i in rng.permutation(len(rows))]


def pack(lengths: np.ndarray, size: int, order: np.ndarray) -> list[list[int]]:
    """Best fit, longest first: each sample into the fullest row that has room. Of equal ones the first in `order`."""
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # rows by the room they have
    some = 0  # a bit for each room that some row has
    for sample in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[sample])
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = free[room].pop()
            if not free[room]:
                some &= ~(1 << room)
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(sample)
        free.setdefault(room - length, []).append(row)
        some |= 1 << (room - length)
    return rows
