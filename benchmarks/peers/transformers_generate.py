"""transformers' prefill and greedy decode of a BF16 folder, as a worker of `leanseek bench decode`.

usage: transformers_generate.py FOLDER NEW CONTEXT
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from leanseek.bench.workers import serve

folder, new, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
ids = random.Random(0)


@torch.inference_mode()
def work(rounds: int) -> dict[str, Any]:
    tokens = torch.tensor([[ids.randrange(model.config.vocab_size) for _ in range(context)]])
    cache, seconds = None, []
    for _ in range(min(new, 16)):
        start = time.perf_counter()
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return {
        "prefill_tokens_per_second": context / seconds[0],
        "decode_tokens_per_second": 1 / statistics.median(seconds[1:]),
    }


work(1)
serve({"folder": folder}, work)
