"""Loss spikes: a batch whose loss stands far above the recent ones is left out, as one with a NaN is."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 128  # losses a new one is compared with
LEAST = 32  # of them, before anything counts as a spike
PATIENCE = 2  # spikes in a row that are left out; the next is taken for a new level of the loss
NOISE = 0.02  # a spread below this share of the loss is not believed


class SpikeGuard:
    """Robust z-score of each loss: its distance from the median of the window over 1.4826 times the median distance.

    `limit` is the z above which a loss is a spike; 0 turns the guard off. Its state is part of a checkpoint.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def spike(self, loss: float) -> str:
        """Take note of a step's loss. "" when the step is to be applied, else what is wrong with it, in words."""
        z, median = self._z(loss)
        if not self.limit or z < self.limit:
            self.in_a_row = 0
            self.losses.append(loss)
            return ""
        self.in_a_row += 1
        if self.in_a_row > PATIENCE:
            self.in_a_row = 0
            self.losses.clear()
            self.losses.append(loss)
            return ""
        return f"the loss is {z:.1f} deviations above {median:.4g}, the median of the last {len(self.losses)}"

    def _z(self, loss: float) -> tuple[float, float]:
        if len(self.losses) < LEAST:
            return 0.0, loss
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
        return (loss - median) / max(spread, NOISE * abs(median), 1e-12), median

    def state(self) -> dict[str, object]:
        return {"losses": list(self.losses), "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, object]) -> None:
        assert isinstance(state["losses"], list) and isinstance(state["in_a_row"], int)
        self.losses.extend(state["losses"])
        self.in_a_row = state["in_a_row"]
