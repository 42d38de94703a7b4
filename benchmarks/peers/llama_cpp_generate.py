"""llama.cpp's prefill and decode of a GGUF, as a worker of `leanseek bench decode`.

usage: llama_cpp_generate.py FILE.gguf NEW CONTEXT        (pip install llama-cpp-python==0.3.36)
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from typing import Any

from llama_cpp import Llama

import leanseek.machine.threads
from leanseek.bench.workers import serve

file, new, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
threads = leanseek.machine.threads.threads()
llm = Llama(
    file,
    n_ctx=context + new + 64,
    n_batch=512,
    n_threads=threads,
    n_threads_batch=threads,
    flash_attn=True,
    verbose=False,
)
ids = random.Random(0)


def work(rounds: int) -> dict[str, Any]:
    prompt = [ids.randrange(llm.n_vocab()) for _ in range(context)]
    llm.reset()
    start = time.perf_counter()
    llm.eval(prompt)
    token = llm.sample(temp=0.0)
    prefill = time.perf_counter() - start
    steps = []
    for _ in range(new - 1):
        start = time.perf_counter()
        llm.eval([token])
        token = llm.sample(temp=0.0)
        steps.append(time.perf_counter() - start)
    return {
        "prefill_tokens_per_second": context / prefill,
        "decode_tokens_per_second": 1 / statistics.median(steps),
    }


work(1)
serve({"file": file}, work)
