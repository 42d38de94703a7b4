"""How penalties and biases change a sequence's logits, updated token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from leanseek.engine.params import SamplingParams

# Ids under the repetition penalty; ids to add a value to; these values.
Adjustment = tuple[np.ndarray, np.ndarray, np.ndarray]


class _Tally:
    """Distinct tokens in order of first appearance, with their counts."""

    def __init__(self, known: Iterable[int] = ()):
        self._places = {token: place for place, token in enumerate(dict.fromkeys(known))}
        self._ids = np.fromiter(self._places, np.int64)
        self._counts = np.zeros(len(self._ids), np.int64)
        self._known = len(self._ids)

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            room = np.zeros(max(64, place), np.int64)
            self._ids, self._counts = np.append(self._ids, room), np.append(self._counts, room)
        self._ids[place] = token
        self._counts[place] += 1

    def remove(self, token: int) -> None:
        """Undo the last `add`."""
        place = self._places[token]
        self._counts[place] -= 1
        if place >= self._known and not self._counts[place]:
            del self._places[token]

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self._places)]


class Penalties:
    """The penalties of one sequence. Each token is counted once; drafts are counted and then removed again.

    ends: tokens that complete the sequence, forbidden before `min_tokens`
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], ends: Iterable[int]):
        self._params = params
        self._by_count = bool(params.presence_penalty or params.frequency_penalty)
        self._prompt_length = self._counted = len(prompt)
        self._seen = _Tally(prompt if params.repetition_penalty != 1 else ())  # prompt and output
        biases = dict(params.logit_bias or {})
        forbidden = list(ends) if params.min_tokens else []
        self._output = _Tally([*forbidden, *biases])
        self._forbidden = len(forbidden)  # these entries come first
        self._biases = np.array([biases.get(token, 0.0) for token in self._output.ids.tolist()])

    def rows(self, tokens: Sequence[int], drafts: Sequence[int]) -> list[Adjustment]:
        """Adjustments for the token after all of `tokens`, and for the one after each draft.

        tokens: prompt and output; may only grow between calls
        """
        tallies = [self._seen] * (self._params.repetition_penalty != 1) + [self._output] * self._by_count
        for tally in tallies:
            for token in tokens[self._counted :]:
                tally.add(token)
        self._counted = len(tokens)
        rows = [self._row(len(tokens))]
        for position, draft in enumerate(drafts, start=len(tokens) + 1):
            for tally in tallies:
                tally.add(draft)
            rows.append(self._row(position))
        for tally in tallies:
            for draft in reversed(drafts):
                tally.remove(draft)
        return rows

    def _row(self, position: int) -> Adjustment:
        """The adjustment for the token at a position; copies, because later counting changes the tallies."""
        counts = self._output.counts
        values = np.zeros(len(counts))
        values[: len(self._biases)] = self._biases
        if self._by_count:
            values -= np.where(counts > 0, self._params.presence_penalty + self._params.frequency_penalty * counts, 0.0)
        if position - self._prompt_length < self._params.min_tokens:
            values[: self._forbidden] = -math.inf
        elif not self._by_count and not self._params.logit_bias:  # min_tokens alone, and they are reached
            return self._seen.ids.copy(), np.empty(0, np.int64), np.empty(0, np.float32)
        return self._seen.ids.copy(), self._output.ids.copy(), values.astype(np.float32)
