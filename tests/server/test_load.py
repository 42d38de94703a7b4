"""A real server process under 1,000 requests of mixed length, 64 at once, a third of whose clients leave early."""

from __future__ import annotations

import pytest

from leanseek.bench.load import bench_load

REQUESTS = 1000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_under_load_loses_nothing() -> None:
    """Every client that stays is answered, every page comes back, memory stays flat, and /health is never late."""
    found = bench_load("demo", REQUESTS)
    assert found["unanswered"] == 0, found
    assert found["ends"]["left"] == REQUESTS // 3 + 1
    assert (found["after"]["running"], found["after"]["waiting"], found["after"]["cache_usage"]) == (0, 0, 0)
    assert found["choices"].keys() <= {"length", "abort"}, "nothing failed"
    assert found["memory"]["growth_bytes_in_second_half"] < 0.05 * found["memory"]["mean_bytes"]
    assert found["exit_code"] == 0
