"""How far ahead to draft: as far as the tokens that drafts bring outweigh the time they take, for each request."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass, field

from leanseek.engine.sequence import Sequence

SMOOTHING = 0.1  # weight of the newest value in a running mean
HOPE = 0.8  # what a draft's chance is taken to be before any was verified
LEAST_COST = 0.05  # of a plain step: no draft is free, whatever a busy machine makes of the difference of two times
TRIALS = 16  # verified steps before a request may stop drafting
EXPLORE_EVERY = 32  # verified steps between two that draft as far as allowed, so that far drafts stay known
TRY_EVERY = 16  # requests between two that draft at first although drafts did not pay for others
PLAIN_STEPS = 4  # steps without drafts that must have been measured before their cost counts
PROBE_EVERY = 128  # steps between two that measure it again
RECENT = 9  # measurements of which the median counts: a step that the system interrupted is none


def _recent() -> deque[float]:
    return deque(maxlen=RECENT)


@dataclass
class _Cost:
    """What a decode step took lately at one batch size."""

    plain: deque[float] = field(default_factory=_recent)  # seconds without drafts
    each: deque[float] = field(default_factory=_recent)  # more seconds for each draft of a sequence
    steps: int = 0

    @property
    def known(self) -> bool:
        return len(self.plain) >= PLAIN_STEPS and bool(self.each)


class Speculation:
    """Counts what drafts bring and measures what they cost, by batch size (in powers of two)."""

    def __init__(self, drafts: int):
        self.drafts = drafts
        self.proposed = [0] * drafts  # per draft position
        self.accepted = [0] * drafts
        self._chances = [HOPE] * drafts  # of each position's draft, where those before it were right
        self._costs: defaultdict[int, _Cost] = defaultdict(_Cost)  # by the batch's bit length
        self._begun = 0  # requests since drafts do not pay

    def begin(self, sequence: Sequence, batch: int) -> None:
        """A request starts with what others found, and does not draft if that would not have paid for them."""
        sequence.chances = list(self._chances)
        cost = self._cost(batch)
        pays = not cost.known or self._best(self._chances, cost) > 0
        sequence.depth = self.drafts if pays or self._begun % TRY_EVERY == 0 else 0
        self._begun += not pays

    def probes(self, batch: int) -> bool:
        """Whether the next decode step of `batch` sequences should run without drafts, to know what they cost."""
        cost = self._cost(batch)
        return self.drafts > 0 and (len(cost.plain) < PLAIN_STEPS or cost.steps % PROBE_EVERY == 0)

    def measured(self, batch: int, verified: int, seconds: float, draft_seconds: float) -> None:
        """A step that only decoded `batch` sequences, with `verified` drafts in all; draft_seconds of it went into
        the next ones."""
        cost = self._cost(batch)
        cost.steps += 1
        if not verified:
            cost.plain.append(seconds - draft_seconds)
        elif cost.plain:
            cost.each.append((seconds - statistics.median(cost.plain)) * batch / verified)

    def judge(self, sequence: Sequence, accepted: int, batch: int) -> None:
        """Count a verification of the sequence's drafts, and settle how many the next step drafts."""
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
        """The number of drafts at which a sequence is expected to go on fastest."""
        if not cost.known:
            return self.drafts
        best = self._best(sequence.chances, cost)
        if best and sequence.trials % EXPLORE_EVERY == 0:
            return self.drafts
        return best if best or sequence.trials >= TRIALS else 1

    @staticmethod
    def _best(chances: list[float], cost: _Cost) -> int:
        """The number of drafts with the most tokens a second."""
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
