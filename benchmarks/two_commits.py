"""Two checkouts of leanseek by turns, on this machine, in one run: is the new one slower, or does it take more memory?

    python benchmarks/two_commits.py OLD NEW --out FILE.json

OLD and NEW are checkouts, each with a virtual environment `.venv` in which leanseek runs from that checkout. Measured
are training (BF16 and FP8), start-up, prefill and decode of one stream, and decode of 16 streams. A ratio above 1 means
that NEW is faster; for memory, that it takes more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from leanseek.bench.machine import machine
from leanseek.bench.models import cache_root, random_model
from leanseek.bench.workers import Worker, say

# Uses what both checkouts have in common: the public LLM and the benchmarks' worker protocol.
SERVING = """
import itertools, os, random, resource, statistics, sys, time
from pathlib import Path
from leanseek import LLM, SamplingParams
from leanseek.bench.workers import serve

folder, context, new = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
start = time.perf_counter()
llm = LLM(folder, int8_head=True, packed_copy=False)
startup = time.perf_counter() - start
ids = random.Random(0)
vocab = 4096

def prompt(length):
    return [ids.randrange(vocab) for _ in range(length)]

def work(rounds):
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    times = [time.perf_counter()]
    for delta in llm.stream(prompt(context), params):
        times += [time.perf_counter()] * len(delta.token_ids)
    steps = [b - a for a, b in itertools.pairwise(times[1:])]
    start = time.perf_counter()
    llm.generate([prompt(16) for _ in range(16)], params)
    batch = time.perf_counter() - start
    first = times[1] - times[0]
    return {"prefill": context / first, "decode": 1 / statistics.median(steps), "16 streams": 16 * new / batch}

work(1)
serve({"startup": startup}, work)
"""


def sides(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Worker programs by what they measure, without the interpreter."""
    train = [arguments.train, str(arguments.batch), str(arguments.seq_len)]
    folder = random_model(arguments.serve, "fp8", cache_root())
    return {
        "training, BF16": ["-m", "leanseek.bench.train", *train, "bf16"],
        "training, FP8": ["-m", "leanseek.bench.train", *train, "fp8"],
        "serving": ["-c", SERVING, str(folder), str(arguments.context), str(arguments.new)],
    }


def turns(commands: dict[str, list[str]], count: int, rounds: int, tokens: int) -> dict[str, dict[str, Any]]:
    """Both sides of one measurement: medians over `count` turns of each."""
    workers = {name: Worker(command) for name, command in commands.items()}
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    try:
        for turn in range(count):
            for name in [*workers] if turn % 2 else [*workers][::-1]:
                answer = workers[name].ready if "error" in workers[name].ready else workers[name].work(rounds)
                if "error" in answer:
                    sys.exit(f"{name}: {answer['error']}")
                if "seconds" in answer:
                    answer["tokens_per_second"] = tokens / statistics.median(answer.pop("seconds"))
                seen[name].append(answer)
        found = {name: {k: statistics.median(a[k] for a in said) for k in said[0]} for name, said in seen.items()}
        for name, worker in workers.items():
            if "startup" in worker.ready:
                found[name]["startups_per_second"] = 1 / worker.ready["startup"]
        return found
    finally:
        for worker in workers.values():
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", default="bench-30m")
    parser.add_argument("--serve", default="bench-3b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", dest="new_tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", help="part of the name of what to measure")
    arguments = parser.parse_args()
    checkouts = {"old": arguments.old.resolve(), "new": arguments.new.resolve()}
    arguments.new = arguments.new_tokens
    found: dict[str, Any] = {"benchmark": "two commits", "machine": machine()}
    for name, folder in checkouts.items():
        found[name] = subprocess.check_output(["git", "-C", folder, "rev-parse", "--short", "HEAD"], text=True).strip()
    results = found["results"] = {}
    for what, program in sides(arguments).items():
        if arguments.only and arguments.only not in what:
            continue
        say(f"{what}: {arguments.turns} turns of each")
        commands = {n: ["env", "-C", str(f), str(f / ".venv/bin/python"), *program] for n, f in checkouts.items()}
        both = turns(commands, arguments.turns, 3, arguments.batch * arguments.seq_len)
        ratios = {key: both["new"][key] / both["old"][key] for key in both["old"]}
        results[what] = both | {"new / old": ratios}
        say(", ".join(f"{key} {ratio:.3f}" for key, ratio in ratios.items()))
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
