"""bench decode: what it counts as a token's floor, and that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanseek.bench import generate
from leanseek.config import ModelConfig


def test_bytes_of_a_token_are_what_peers_md_counts() -> None:
    """bench-3b activates 0.753 B parameters beside embedding, norms and gates: a byte each with an INT8 head."""
    config = ModelConfig.preset("bench-3b")
    small, large = (generate.decode_bytes(config, "fp8", head, 0) for head in ("int8", "stored"))
    assert small == pytest.approx(0.753e9, rel=0.005)
    assert large - small == 129280 * 1536
    assert generate.decode_bytes(config, "fp8", "int8", 512) - small == 512 * 16 * (512 + 64) * 2


def test_a_small_preset_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(generate, "TURNS", 1)
    monkeypatch.setattr(generate, "machine", lambda: {"emulated": [], "gemm_flops_bfloat16": 1e12})
    monkeypatch.setattr(generate, "SIDES", {name: generate.SIDES[name] for name in ("fp8, int8 head",)})
    found = generate.bench_generate("demo", [], [16])
    assert set(found["results"]["16"]) == set(generate.SIDES)
    for side in found["results"]["16"].values():
        assert side["decode_tokens_per_second"] > 0 and side["prefill_tokens_per_second"] > 0
