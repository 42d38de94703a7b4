"""What only a GPU can tell, within eight minutes: `make gpu-check`, or this script in a checkout.

The parts run one after the other, the most worth first, each in a process of its own with a limit of time. The JSON
file is written anew after each, so a run that is cut keeps what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT = 480  # seconds of the whole run

# name, command, seconds at most. `python` is this interpreter; a part prints JSON last, pytest a summary.
BENCH_1B = ["--preset", "bench-1b", "--batch", "16", "--seq-len", "2048", "--steps", "3"]
TESTS = [f"tests/ops/test_triton_{name}.py" for name in ("serving", "training", "fp8")] + [
    "tests/checkpoint/test_roundtrip.py"
]
PARTS: list[tuple[str, list[str], int]] = [
    ("engine tests", ["-m", "pytest", "-p", "no:cacheprovider", "tests/engine/test_cuda.py"], 120),
    ("engine", ["-m", "leanseek.bench.engine"], 90),
    ("train bench-1b", ["-m", "leanseek", "bench", "train", *BENCH_1B, "--json"], 150),
    ("kernel tests", ["-m", "pytest", "-p", "no:cacheprovider", *TESTS], 180),
    ("kernels", ["-m", "leanseek", "bench", "kernels", "--json"], 120),
]


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON file  [benchmarks/results/gpu-check-DEVICE.json]")
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(name for name, *_ in PARTS)}  [all]")
    wanted = parser.parse_args()
    if unknown := set(wanted.parts) - {name for name, *_ in PARTS}:
        parser.error(f"no part {sorted(unknown)[0]!r}")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    out = wanted.out or ROOT / "benchmarks" / "results" / f"gpu-check-{slug}.json"
    report: dict[str, Any] = {"benchmark": "gpu-check", "device": device, "torch": torch.__version__, "parts": {}}
    start = time.monotonic()
    for name, arguments, limit in PARTS:
        if wanted.parts and name not in wanted.parts:
            continue
        left = LIMIT - (time.monotonic() - start)
        report["parts"][name] = part = _run(arguments, min(limit, left)) if left > 5 else {"skipped": "no time left"}
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {part.get('summary') or part.get('error') or part.get('skipped') or 'measured'}", flush=True)
    print(out)
    return int(any("error" in part for part in report["parts"].values()))


def _run(arguments: list[str], limit: float) -> dict[str, Any]:
    """One part: what it printed last, as JSON or as a line; why it failed; the seconds it took."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, timeout=limit, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        printed, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as cut:
        printed = cut.stdout.decode(errors="replace") if isinstance(cut.stdout, bytes) else cut.stdout or ""
        failed = True
        printed += f"\ncut after {limit:.0f} s"
    part: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1)}
    lines = [line for line in printed.splitlines() if line.strip()]
    try:
        part["result"] = json.loads(lines[-1])
    except (IndexError, ValueError):
        part["summary"] = lines[-1] if lines else ""
    if failed:
        part["error"] = "\n".join(lines[-60:])
    return part


if __name__ == "__main__":
    sys.exit(main())
