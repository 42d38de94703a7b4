"""The engine on this machine's device, one network of random BF16 weights: prefill, decode, streams together.

As a program it prints one JSON object: `python -m leanseek.bench.engine [PRESET]`.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from typing import Any

import torch

from leanseek.backends import backend_of
from leanseek.bench.generate import decode_bytes, prefill_flops
from leanseek.bench.machine import machine
from leanseek.config import ModelConfig
from leanseek.engine import LLM, Engine, SamplingParams
from leanseek.machine.device import default_device
from leanseek.model import Transformer

CONTEXT, NEW, ROUNDS = 512, 32, 3
STREAMS = (1, 16)


def bench_engine(preset: str) -> dict[str, Any]:
    """Medians of `ROUNDS` at `CONTEXT` tokens before; nothing is read from a disk.

    Raises:
        ConfigError: there is no such preset.
    """
    config, device, limits = ModelConfig.preset(preset), default_device(), machine()
    model = Transformer(config, device, torch.bfloat16).requires_grad_(False)
    model.init_weights(0)
    llm = LLM(
        Engine(backend_of(model), cache_gib=4.0, step_tokens=2048, step_seconds=60.0, speculate=0, prefix_cache=False)
    )
    ids = random.Random(0)
    results: dict[str, Any] = {}
    for streams in STREAMS:
        rounds = [_round(llm, ids, streams) for _ in range(ROUNDS + 1)][1:]  # the first one warms up
        prefill, decode = (statistics.median(each) for each in zip(*rounds, strict=True))
        results[f"leanseek, {streams} streams"] = {
            "prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode,
            "share_of_bfloat16_gemm": prefill * prefill_flops(config, CONTEXT) / limits["gemm_flops_bfloat16"],
        }  # fmt: skip
    alone = results["leanseek, 1 streams"]
    read = decode_bytes(config, "bf16", "stored", CONTEXT) * alone["decode_tokens_per_second"]
    alone["share_of_read_bandwidth"] = read / limits["read_bytes_per_second"]
    return {"benchmark": "engine", "preset": preset, "context": CONTEXT, "machine": limits, "results": results}


def _round(llm: LLM, ids: random.Random, streams: int) -> tuple[float, float]:
    """Prompt tokens per second until all have their first token, then tokens per second of all together."""
    prompts = [[ids.randrange(llm.engine.config.vocab_size) for _ in range(CONTEXT)] for _ in range(streams)]
    times = []
    for new in (1, NEW):
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True))
        times.append(time.perf_counter() - start)
    return streams * CONTEXT / times[0], streams * (NEW - 1) / (times[1] - times[0])


if __name__ == "__main__":
    print(json.dumps(bench_engine(sys.argv[1] if len(sys.argv) > 1 else "bench-3b")))
