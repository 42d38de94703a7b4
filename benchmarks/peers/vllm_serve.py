"""vLLM on a CPU as a worker of `leanseek bench serve`; it runs in an environment of its own (docs/bench.md).

usage: vllm_serve.py WORKERS.py FOLDER
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from vllm import LLM, SamplingParams

# leanseek is not in this environment; its protocol is one file that needs nothing.
spec = importlib.util.spec_from_file_location("workers", sys.argv[1])
assert spec and spec.loader
workers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(workers)

PROMPT, NEW = 128, 128  # as in leanseek/bench/serve.py


def main(folder: str) -> None:
    llm = LLM(folder, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=2048, seed=0)
    vocabulary = llm.model_config.get_vocab_size()
    generator = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)

    def work(streams: int) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": generator.choices(range(2, vocabulary), k=PROMPT)} for _ in range(streams)]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"tokens_per_second": tokens / seconds}

    work(1)
    workers.serve({"pid": os.getpid()}, work)


if __name__ == "__main__":
    main(sys.argv[2])
