"""Token shards -> packed batches, as a pure function of (seed, sample number), so resuming needs one integer.

An epoch concatenates every document of the split in a seeded order (packing without a mask between documents, as in
section 4.1) and splits the result into windows of seq_len tokens. A window also holds the `lookahead` tokens after it,
which its last positions predict. With `fim_rate`, that share of the documents is first rearranged as
prefix-suffix-middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanseek.data.batch import Batch
from leanseek.data.formats import DataError
from leanseek.data.shards import SPLITS, Shards
from leanseek.data.tokenizer import fim_tokens, load_tokenizer
from leanseek.tokens import special_tokens


class TokenDataset:
    """One split of a prepared folder, memory-mapped and checked (see `Shards`).

    A validation split shorter than a window becomes one shorter window, of `seq_len` tokens; it may be empty.

    Raises:
        DataError: the folder is not finished, a shard is damaged (named), there are fewer tokens than one window, or
            the tokenizer lacks the tokens for FIM.
    """

    def __init__(
        self, folder: Path, split: str, seq_len: int, lookahead: int = 1, seed: int = 0, fim_rate: float = 0.0
    ):
        if split not in SPLITS:
            raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        self.folder, self.split, self.lookahead = folder, split, lookahead
        self.seed, self.fim_rate = seed, fim_rate
        self.shards: list[np.ndarray] = []
        starts, ends, shard_of = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        stored = Shards(folder, kinds=("text",))
        for number, entry in enumerate(stored.entries):
            if getattr(entry, split).documents:
                tokens, doc_ends = stored.open(number, split)
                starts.append(np.concatenate(([0], doc_ends[:-1])))
                ends.append(doc_ends)
                shard_of.append(np.full(len(doc_ends), len(self.shards)))
                self.shards.append(tokens)
        stored.keep_stamps()
        total = sum(map(len, self.shards))
        if split == "train" and total < seq_len + lookahead:
            raise DataError(
                f"{folder} has {total} train tokens, fewer than the {seq_len + lookahead} of one window; prepare more "
                "text or lower seq_len"
            )
        self.seq_len = min(seq_len, max(total - lookahead, 1))
        self.starts, self.ends, self.shard_of = map(np.concatenate, (starts, ends, shard_of))
        self.samples_per_epoch = max(total - lookahead, 0) // self.seq_len
        self.token_bytes = torch.from_numpy(stored.token_bytes)
        tokenizer = load_tokenizer(folder)
        self.special, self.fim = special_tokens(tokenizer, folder), fim_tokens(tokenizer)
        if fim_rate and self.fim is None:
            raise DataError(f"the tokenizer in {folder} has no fill-in-middle tokens; set fim_rate = 0")
        self._epoch: tuple[int, Any, Any, Any] = (-1, None, None, None)

    @property
    def end(self) -> int:
        """The id that ends a document."""
        return self.special.eos[0]

    def __len__(self) -> int:
        """Documents of the split."""
        return len(self.starts)

    def batch(self, start_sample: int, n: int) -> Batch:
        """Samples start_sample to start_sample + n (exclusive) of the endless stream of epochs."""
        rows = [self._sample(i) for i in range(start_sample, start_sample + n)]
        return Batch(torch.from_numpy(np.stack(rows)), n)

    def in_order(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """One pass over the split for evaluation, in stored order and without FIM: at most `limit` windows."""
        lengths = self.ends - self.starts
        order, stops = np.arange(len(self)), np.cumsum(lengths)
        count = min(self.samples_per_epoch, limit or self.samples_per_epoch)
        for first in range(0, count, batch_size):
            windows = range(first, min(first + batch_size, count))
            rows = [self._window(i * self.seq_len, order, stops, None) for i in windows]
            yield Batch(torch.from_numpy(np.stack(rows)), len(rows))

    def _sample(self, sample: int) -> np.ndarray:
        epoch, place = divmod(sample, self.samples_per_epoch)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self))
            rearranged = rng.random(len(self)) < self.fim_rate
            # FIM adds three tokens; we drop the few windows that this adds, so that all epochs are equally long
            stops = np.cumsum((self.ends - self.starts + 3 * rearranged)[order])
            self._epoch = (epoch, order, stops, rearranged)
        _, order, stops, rearranged = self._epoch
        return self._window(place * self.seq_len, order, stops, rearranged)

    def _window(self, start: int, order: np.ndarray, stops: np.ndarray, rearranged: np.ndarray | None) -> np.ndarray:
        """Tokens start to start + seq_len + lookahead of the documents in `order`, which end at `stops`."""
        size = self.seq_len + self.lookahead
        out = np.empty(size, dtype=np.int64)
        filled, place = 0, int(np.searchsorted(stops, start, side="right"))
        offset = start - (int(stops[place - 1]) if place else 0)
        while filled < size:
            document = int(order[place])
            tokens = self.shards[self.shard_of[document]][self.starts[document] : self.ends[document]]
            if rearranged is not None and rearranged[document]:
                tokens = self._fill_in_middle(tokens, document)
            part = tokens[offset : offset + size - filled]
            out[filled : filled + len(part)] = part
            filled, place, offset = filled + len(part), place + 1, 0
        return out

    def _fill_in_middle(self, tokens: np.ndarray, document: int) -> np.ndarray:
        """PSM (4.1): <begin> prefix <hole> suffix <end> middle <eos>, with cuts drawn from (seed, epoch, document).

        The tokenizer's leading tokens stay in front.
        """
        assert self.fim is not None
        begin, hole, end = self.fim
        leading = len(self.special.leading)
        if tuple(tokens[:leading].tolist()) != self.special.leading:
            leading = 0
        body = tokens[leading:-1].astype(np.int64)
        rng = np.random.default_rng([self.seed, self._epoch[0], document])
        a, b = np.sort(rng.integers(0, len(body) + 1, size=2))
        parts = (tokens[:leading], [begin], body[:a], [hole], body[b:], [end], body[a:b], tokens[-1:])
        return np.concatenate([np.asarray(p, dtype=np.int64) for p in parts])
