"""What penalties and biases do to a sequence's logits, kept up to date token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from leanseek.engine.params import SamplingParams

Adjustment = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids under the repetition penalty; ids, and what to add to each


class _Tally:
    """Distinct tokens in order of their first appearance, and how often each came."""

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
        """Take back the token that was added last."""
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
    """Of one sequence. Its tokens are counted once, whatever its length; drafts are counted and taken back.

    ends: tokens that complete it, which are forbidden before `min_tokens`
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], ends: Iterable[int]):
        self._params = params
        self._by_count = bool(params.presence_penalty or params.frequency_penalty)
        self._prompt_length = self._counted = len(prompt)
        self._seen = _Tally(prompt if params.repetition_penalty != 1 else ())  # prompt and output
        biases = dict(params.logit_bias or {})
        forbidden = list(ends) if params.min_tokens else []
        self._output = _Tally([*forbidden, *biases])
        self._forbidden = len(forbidden)  # the first entries
        self._biases = np.array([biases.get(token, 0.0) for token in self._output.ids.tolist()])

    def rows(self, tokens: Sequence[int], drafts: Sequence[int]) -> list[Adjustment]:
        """Adjustments for the token after all of `tokens`, and for the one after each draft.

        tokens: prompt and output; since the last call they have only grown
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
        """For the token at a position. Copies: what is counted next changes the tallies."""
        counts = self._output.counts
        values = np.zeros(len(counts))
        values[: len(self._biases)] = self._biases
        if self._by_count:
            values -= np.where(counts > 0, self._params.presence_penalty + self._params.frequency_penalty * counts, 0.0)
        if position - self._prompt_length < self._params.min_tokens:
            values[: self._forbidden] = -math.inf
        elif not self._by_count and not self._params.logit_bias:  # nothing but min_tokens, which are past
            return self._seen.ids.copy(), np.empty(0, np.int64), np.empty(0, np.float32)
        return self._seen.ids.copy(), self._output.ids.copy(), values.astype(np.float32)
