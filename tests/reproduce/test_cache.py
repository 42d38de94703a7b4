"""The cache that a stream holds in the engine, against arithmetic on the configuration."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from leanseek import planning
from leanseek.config import ModelConfig
from leanseek.reproduce import cache


@pytest.mark.parametrize("changes", [{}, *({"attention": "gqa", "num_key_value_heads": heads} for heads in (4, 2, 1))])
def test_a_stream_holds_what_its_tokens_take(tiny_config: Callable[..., ModelConfig], changes: dict) -> None:
    """250 tokens in pages of 16: rounded up to 256; with an MTP module, which makes no drafts here, no more."""
    config = tiny_config(**changes, num_nextn_predict_layers=1)
    found = cache.served(config, context=250, cache_gib=0.01)
    assert found["bytes"] == 256 * planning.kv_bytes_per_token(config)
    assert found["bytes_per_token"] == found["bytes"] / 250
    assert found["streams_per_gib"] == 2**30 / found["bytes"]


def test_v3_as_published() -> None:
    found = cache.published(8192)
    assert found["mla"]["bytes_per_token"] == 70272
    assert found["mha"]["bytes_per_token"] == 4_997_120
    assert found["mla"]["bytes"] == 70272 * 8192
    assert 1.8 < found["mla"]["streams_per_gib"] < 1.9
