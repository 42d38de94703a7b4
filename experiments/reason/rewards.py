"""Rewards of `make reason` besides the built-in ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any


def coin(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """0 or 1 by chance alone, a function of the whole rollout. What a policy gains by it, it gains without a signal."""
    digest = hashlib.blake2b(repr([list(ids) for ids in completion_ids]).encode()).digest()
    chance = random.Random(digest)
    return [float(chance.random() < 0.5) for _ in completion_ids]
