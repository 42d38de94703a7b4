"""Decides, per request, how many drafts to make: as many as gain more from accepted tokens than they cost in time."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass, field

from leanseek.engine.sequence import Sequence

SMOOTHING = 0.1  # weight of the newest value in a running mean of acceptance
HOPE = 0.8  # assumed acceptance rate of a draft before any was verified
LEAST_COST = 0.05  # of a plain step: no draft is free, even if timing noise on a busy machine says so
TRIALS = 16  # verified steps before a request may stop drafting
EXPLORE_EVERY = 32  # every so many verified steps, draft to the limit, to keep measuring far drafts
TRY_EVERY = 16  # every so many requests, draft at first although drafts did not pay for others
PLAIN_STEPS = 4  # steps without drafts to measure before their cost counts
PROBE_EVERY = 128  # every so many steps, measure a step without drafts again
RECENT = 9  # measurements to take the median of, which ignores steps that the system interrupted


def _recent() -> deque[float]:
    return deque(maxlen=RECENT)


@dataclass
class _Cost:
    """Recent times of decode steps at one batch size."""

    plain: deque[float] = field(default_factory=_recent)  # seconds without drafts
    each: deque[float] = field(default_factory=_recent)  # additional seconds for each draft of a sequence
    steps: int = 0

    @property
    def known(self) -> bool:
        return len(self.plain) >= PLAIN_STEPS and bool(self.each)


class Speculation:
    """Counts accepted drafts and measures their cost, by batch size (in powers of two)."""

    def __init__(self, drafts: int):
        self.drafts = drafts
        self.proposed = [0] * drafts  # per draft position
        self.accepted = [0] * drafts
        self._chances = [HOPE] * drafts  # acceptance rate of each draft if those before it were right
        self._costs: defaultdict[int, _Cost] = defaultdict(_Cost)  # by the batch's bit length
        self._begun = 0  # requests begun while drafts did not pay

    def begin(self, sequence: Sequence, batch: int) -> None:
        """Start a request with the acceptance rates of the others, and without drafts if those did not pay."""
        sequence.chances = list(self._chances)
        cost = self._cost(batch)
        pays = not cost.known or self._best(self._chances, cost) > 0
        sequence.depth = self.drafts if pays or self._begun % TRY_EVERY == 0 else 0
        self._begun += not pays

    def probes(self, batch: int) -> bool:
        """Whether the next decode step of `batch` sequences should run without drafts, to measure what drafts cost."""
        cost = self._cost(batch)
        return self.drafts > 0 and (len(cost.plain) < PLAIN_STEPS or cost.steps % PROBE_EVERY == 0)

    def measured(self, batch: int, verified: int, seconds: float, draft_seconds: float) -> None:
        """Record a step that only decoded `batch` sequences and verified `verified` drafts in all; of its seconds,
        draft_seconds went into making the next drafts."""
        cost = self._cost(batch)
        cost.steps += 1
        if not verified:
            cost.plain.append(seconds - draft_seconds)
        elif cost.plain:
            cost.each.append((seconds - statistics.median(cost.plain)) * batch / verified)

    def judge(self, sequence: Sequence, accepted: int, batch: int) -> None:
        """Record how many of the sequence's drafts were accepted, and set how many to make in the next step."""
        proposed = len(sequence.drafts)
        sequence.draft_tokens += proposed
        sequence.accepted_tokens += accepted
        sequence.trials += 1
        for position in range(proposed):
            self.proposed[position] += 1
            self.accepted[position] += position < accepted
            if position <= accepted:
                for chances in (self._chances, sequence.chances):
                    chances[position] += ((position < accepted) - chances[position]) * SMOOTHING
        sequence.depth = self._depth(sequence, self._cost(batch))

    def _depth(self, sequence: Sequence, cost: _Cost) -> int:
        """The number of drafts with which a sequence is expected to run fastest."""
        if not cost.known:
            return self.drafts
        best = self._best(sequence.chances, cost)
        if best and sequence.trials % EXPLORE_EVERY == 0:
            return self.drafts
        return best if best or sequence.trials >= TRIALS else 1

    @staticmethod
    def _best(chances: list[float], cost: _Cost) -> int:
        """The number of drafts with the most expected tokens per second."""
        plain = statistics.median(cost.plain)
        each = max(statistics.median(cost.each), LEAST_COST * plain)
        tokens, going = 1.0, 1.0
        rates = [tokens / plain]
        for count, chance in enumerate(chances, start=1):
            going *= chance
            tokens += going
            rates.append(tokens / (plain + count * each))
        return max(range(len(rates)), key=rates.__getitem__)

    def _cost(self, batch: int) -> _Cost:
        return self._costs[batch.bit_length()]
