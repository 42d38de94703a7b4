"""The memory that the engine's cache takes for a network, read off an engine with a request in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from leanseek import planning
from leanseek.backends.protocol import Trace
from leanseek.config import ModelConfig
from leanseek.engine import Engine, Request, SamplingParams
from leanseek.engine.engine import GIB
from leanseek.ops import CacheIndex

CONTEXT = 8192  # tokens of a stream


class _Still:
    """A step backend that computes nothing: what the engine keeps does not depend on the values."""

    def __init__(self, config: ModelConfig):
        self.config, self.device, self.dtype = config, torch.device("cpu"), torch.bfloat16

    def step(self, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Tensor:
        return torch.zeros(len(tokens), self.config.hidden_size, dtype=self.dtype)

    def step_ahead(self, depth: int, hidden: Tensor, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Tensor:
        return hidden

    def trace(self, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Trace:
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(len(hidden), self.config.vocab_size)


def served(config: ModelConfig, context: int = CONTEXT, cache_gib: float = 1.0) -> dict[str, Any]:
    """Bytes of the cache in BF16 that one stream of `context` tokens holds in an engine of `cache_gib`, and how many
    such streams a GiB holds. Without MTP modules: drafts have a layer of their own in the cache.
    """
    config = dataclasses.replace(config, max_position_embeddings=context + 1, num_nextn_predict_layers=0)
    engine = Engine(_Still(config), cache_gib=cache_gib, prefix_cache=False, step_seconds=60.0)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.add(Request("stream", [token % config.vocab_size for token in range(context - 1)], params))
    used = 0
    while engine.has_work():
        engine.step()
        used = max(used, engine.stats().pages_used)
    stats = engine.stats()
    held = used * (stats.cache_bytes // (stats.pages_total + 1))  # one page is the runner's own
    return {"context": context, "bytes": held, "bytes_per_token": held / context, "streams_per_gib": GIB / held}


def published(context: int = CONTEXT) -> dict[str, dict[str, float]]:
    """The same of V3 by arithmetic: its own latents, and plain keys and values of as many heads as it has, 8, and 1."""
    v3 = ModelConfig.preset("v3-671b")
    each = {
        "mla": planning.kv_bytes_per_token(v3),
        "mha": planning.kv_bytes_per_token_as(v3, v3.num_attention_heads),
        "gqa": planning.kv_bytes_per_token_as(v3, 8),
        "mqa": planning.kv_bytes_per_token_as(v3, 1),
    }
    return {
        name: {"bytes_per_token": size, "bytes": size * context, "streams_per_gib": GIB / (size * context)}
        for name, size in each.items()
    }
