"""Detects loss spikes: a batch whose loss is far above recent ones is skipped, like one with a NaN."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 128  # recent losses that a new one is compared with
LEAST = 32  # losses needed before anything counts as a spike
PATIENCE = 2  # spikes in a row that are skipped; after them, the loss is taken to have a new level
NOISE = 0.02  # lower bound of the spread, as a share of the loss


class SpikeGuard:
    """Robust z-score of each loss: its distance from the window's median, divided by 1.4826 times the median distance.

    A loss with z of `limit` or more is a spike; 0 turns the guard off. The state is saved in checkpoints.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def spike(self, loss: float) -> str:
        """Record a step's loss. Returns "" if the step should be applied, else what is wrong with it, in words."""
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
