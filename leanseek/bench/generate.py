"""Prefill and decode speed of one request, next to the floor that memory sets and to llama.cpp and transformers.

As a program it is the worker: `python -m leanseek.bench.generate FOLDER int8|stored CONTEXT`, which prefills CONTEXT
tokens and decodes NEW more as often as it is told (bench/workers.py).
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from leanseek.bench.machine import fastest_dtype, machine, read_bandwidth
from leanseek.bench.models import cache_root, random_model
from leanseek.bench.workers import Worker, peer_command, say, serve
from leanseek.checkpoint import export_gguf, read_config
from leanseek.config import ModelConfig
from leanseek.engine import LLM, SamplingParams
from leanseek.errors import RunError
from leanseek.model import Transformer

NEW = 32  # tokens decoded a round
TURNS = 3
# ours by name: how the weights are stored, and the head
SIDES = {"fp8, int8 head": ("fp8", "int8"), "fp8": ("fp8", "stored"), "bf16": ("bf16", "stored")}
# a peer's mode and which of ours has weights of its size
PEERS = {
    "llama.cpp": (("q8_0", "fp8, int8 head"), ("bf16", "bf16")),
    "transformers": (("bfloat16", "fp8, int8 head"),),
}


def bench_generate(preset: str, peers: list[str], contexts: list[int]) -> dict[str, Any]:
    """Medians of prefill and decode rates by context. A peer's process takes turns with ours of about its size, two
    processes at a time: what a machine of 24 GB holds of a 3B network.

    Raises:
        InputError: there is no such preset.
        RunError: our own side failed.
    """
    config = ModelConfig.preset(preset)
    limits = machine()
    notes: list[str] = []
    fastest = fastest_dtype(limits)
    alone = {name: _command(preset, name) for name in SIDES}
    results: dict[str, Any] = {}
    for context in contexts:
        by_side = results[str(context)] = {
            name: _turns({name: command}, context)[name] for name, command in alone.items()
        }
        for name, side in by_side.items():
            side["bytes_per_token"] = decode_bytes(config, *SIDES[name], context)
            read = side["bytes_per_token"] * side["decode_tokens_per_second"]
            side["share_of_read_bandwidth"] = read / side["read_bytes_per_second"]
            rate = side["prefill_tokens_per_second"] * prefill_flops(config, context)
            side[f"share_of_{fastest}_gemm"] = rate / limits[f"gemm_flops_{fastest}"]
    pairs: list[dict[str, Any]] = []
    for peer, mode, ours in [(p, mode, ours) for p in peers for mode, ours in PEERS[p]]:
        theirs = f"{peer} {mode}"
        if peer == "transformers" and mode in limits["emulated"]:
            notes.append(f"{theirs}: left out, torch emulates {mode} here")
            continue
        try:
            found = _turns({ours: alone[ours], theirs: _peer(peer, mode, preset)}, contexts[0])
        except RunError as error:
            notes.append(str(error))
            continue
        pairs.append(
            {"context": contexts[0], "ours": ours, "peer": theirs, "results": found} | _ratios(found, ours, theirs)
        )
    return {
        "benchmark": "generate", "preset": preset, "machine": limits,
        "results": results, "peers": pairs, "notes": notes,
    }  # fmt: skip


def decode_bytes(config: ModelConfig, weights: str, head: str, context: int) -> int:
    """Bytes that a decoded token cannot do without: every activated weight and the cached latents, once each."""
    model = Transformer(config, device="meta")
    one = {"fp8": 1, "bf16": 2}[weights]
    total = 0
    for name, p in model.named_parameters():
        share = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1
        if name.startswith(("embed_tokens", "mtp")):
            continue
        if name.startswith("lm_head"):
            size = 1 if head == "int8" else 2
        else:
            size = one if p.ndim > 1 and ".gate.weight" not in name else 2
        total += int(p.numel() * share) * size
    return total + config.num_hidden_layers * config.cache_width * 2 * context


def prefill_flops(config: ModelConfig, context: int) -> float:
    """FLOP of a prefilled token's matrices (the head runs once a prompt) and its attention, in the absorbed form."""
    matrices = decode_bytes(config, "fp8", "int8", 0) - config.vocab_size * config.hidden_size
    width = config.cache_width + config.kv_lora_rank
    return 2 * matrices + config.num_hidden_layers * config.num_attention_heads * width * context  # 2 · context / 2


def _command(preset: str, name: str) -> list[str]:
    weights, head = SIDES[name]
    folder = random_model(preset, "fp8" if weights == "fp8" else "bf16", cache_root())
    return [sys.executable, "-m", "leanseek.bench.generate", str(folder), head]


def _peer(peer: str, mode: str, preset: str) -> list[str]:
    folder = random_model(preset, "bf16", cache_root())
    if peer == "transformers":
        return peer_command("transformers_generate", str(folder), str(NEW))
    file = folder.with_name(f"{folder.name}-{mode}.gguf")
    if not file.exists():
        export_gguf(folder, file, mode)
    return peer_command("llama_cpp_generate", str(file), str(NEW))


def _turns(sides: dict[str, list[str]], context: int) -> dict[str, dict[str, float]]:
    say(f"{' beside '.join(sides)}, {context} tokens of context")
    workers = {name: Worker([*command, str(context)]) for name, command in sides.items()}
    try:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for _ in range(TURNS):
            for name, worker in workers.items():
                answer = worker.ready if "error" in worker.ready else worker.work(1)
                if "error" in answer:
                    raise RunError(f"{name}: {answer['error']}")
                runs[name].append(answer)
        return {name: {key: _median(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    finally:
        for worker in workers.values():
            worker.close()


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _ratios(found: dict[str, dict[str, float]], ours: str, theirs: str) -> dict[str, float]:
    keys = ("prefill_tokens_per_second", "decode_tokens_per_second")
    return {f"{key.split('_')[0]}_ratio": found[ours][key] / found[theirs][key] for key in keys}


def _worker(folder: str, head: str, context: str) -> None:
    llm = LLM(Path(folder), int8_head=head == "int8", packed_copy=False)
    ids, vocab_size = random.Random(0), read_config(Path(folder)).vocab_size

    def work(rounds: int) -> dict[str, Any]:
        prompt = [ids.randrange(vocab_size) for _ in range(int(context))]
        times = [time.perf_counter()]
        for delta in llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)):
            times += [time.perf_counter()] * len(delta.token_ids)
        steps = [b - a for a, b in itertools.pairwise(times[1:])]
        return {
            "prefill_tokens_per_second": int(context) / (times[1] - times[0]),
            "decode_tokens_per_second": 1 / statistics.median(steps),
            "read_bytes_per_second": read_bandwidth("cpu"),  # now: on shared machines it comes and goes
        }

    work(1)
    serve({"pid": os.getpid()}, work)


if __name__ == "__main__":
    _worker(*sys.argv[1:4])
