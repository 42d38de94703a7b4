"""What rollouts went through, kept for the step that trains on them.

Training's exact forward computes again what the engine has computed with the same weights, bit for bit. A `Recorder`
stands before the engine's backend and keeps each row's states and experts. Rows are found again by their tokens: the
step is row-invariant, so a row is its token after the row before it, whoever asked for it. Beginnings that sequences
share are then one, what is computed twice is kept once, and the row of a refused draft is one that nobody asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from leanseek.backends import StepBackend
from leanseek.backends.protocol import Trace
from leanseek.machine.memory import empty
from leanseek.ops import CacheIndex

ROOT = -1  # before a first token


class Tree:
    """Rows, numbered from 0 as they come: each a token after another row, or after ROOT."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}  # by both in one number, which the garbage collector does not visit

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(row before, token) of each row; what comes before a row has come before."""
        return ((key >> 32, key & 0xFFFFFFFF) for key in self._rows)

    def add(self, before: int, token: int) -> int:
        return self._rows.setdefault(before << 32 | token, len(self._rows))

    def find(self, before: int, token: int) -> int | None:
        return self._rows.get(before << 32 | token)


class Recorder:
    """As StepBackend: `backend`, keeping what `step` goes through as long as all of it fits into `room` bytes.

    The engine's cache must be empty when it comes into use: of rows computed by others it knows nothing.
    """

    def __init__(self, backend: StepBackend, room: int):
        self.backend = backend
        self.config, self.device, self.dtype = backend.config, backend.device, backend.dtype
        self.step_ahead, self.logits, self.trace = backend.step_ahead, backend.logits, backend.trace
        c, layers = self.config, self.config.num_hidden_layers
        states = (layers + 2) * c.hidden_size * self.dtype.itemsize
        self._begin(room // (states + layers * c.num_experts_per_tok * torch.int64.itemsize))

    def _begin(self, rows: int) -> None:
        """Know nothing, with memory for `rows` rows; what is not written to takes none."""
        c, layers = self.config, self.config.num_hidden_layers
        self._room, self._tree = rows, Tree()
        self._at: dict[int, int] = {}  # the row whose latent is in a slot of the cache
        # as in Trace; the last is its `hidden`
        self._states = empty((layers + 2, rows, c.hidden_size), self.dtype, self.device)
        self._routes = empty((layers, rows, c.num_experts_per_tok), torch.int64, self.device)

    def step(self, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Tensor:
        first = len(self._tree)
        if first + len(tokens) > self._room:
            if self._room:
                self._begin(0)
            return self.backend.step(tokens, cache, index)
        found = self.backend.trace(tokens, cache, index)
        fresh = self._note(tokens, index)
        rows = slice(first, len(self._tree))
        pick = slice(None) if len(fresh) == len(tokens) else torch.tensor(fresh, dtype=torch.int64, device=self.device)
        self._states[:-1, rows] = found.states[:, pick]
        self._states[-1, rows] = found.hidden[pick]
        self._routes[:, rows] = found.routes[:, pick]
        return found.hidden

    def _note(self, tokens: Tensor, index: CacheIndex) -> list[int]:
        """Add a step's N rows to the tree; which of them are new."""
        size, pages = index.page_size, index.pages
        lists = (index.row_offsets, index.positions, index.slots, tokens)
        offsets, positions, slots, words = (each.tolist() for each in lists)
        fresh: list[int] = []
        for sequence, (first, stop) in enumerate(pairwise(offsets)):
            if first == stop:
                continue
            position, slot = positions[first], slots[first]
            if position == 0:
                row = ROOT
            elif position % size:
                row = self._at[slot - 1]
            else:  # the row before it is the last of another page
                row = self._at[(int(pages[sequence, position // size - 1]) + 1) * size - 1]
            for n in range(first, stop):
                known = len(self._tree)
                row = self._at[slots[n]] = self._tree.add(row, words[n])
                if row == known:
                    fresh.append(n)
        return fresh

    def recall(self, rows: Tree) -> Trace | None:
        """What these rows went through; None where one of them is not known."""
        found: list[int] = []
        for before, token in rows:
            row = self._tree.find(ROOT if before == ROOT else found[before], token)
            if row is None:
                return None
            found.append(row)
        pick = torch.tensor(found, dtype=torch.int64, device=self.device)
        states = self._states.index_select(1, pick)  # in a third of the time that [:, pick] takes
        return Trace(states[:-1], self._routes.index_select(1, pick), states[-1])
