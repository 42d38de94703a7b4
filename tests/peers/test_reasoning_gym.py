"""reasoning-gym's rows and graders through the reward of that name."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic", "word_sorting", "gcd"])
def test_its_own_answers_score_1_and_others_less(name: str) -> None:
    gym: Any = pytest.importorskip("reasoning_gym")
    from leanseek.posttraining import graders

    rows = list(gym.create_dataset(name, size=5, seed=1))
    answers, metadata = [row["answer"] for row in rows], [row["metadata"] for row in rows]
    assert graders.reasoning_gym([f"<think>so</think>{a}" for a in answers], answers, metadata) == [1.0] * 5
    wrong = graders.reasoning_gym(["<think>so</think>nonsense"] * 5, answers, metadata)
    assert max(wrong) < 0.5
