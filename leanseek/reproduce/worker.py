"""One run in a process of its own: trains an arm of one thread, then measures it for each claim that has this arm.

    python -m leanseek.reproduce.worker FOLDER [--quick] < JOB

JOB is a line of JSON, {"arms": [[the claim's folder, arm], ...], "seed": S}. When standard input ends, the process
stops with its last step saved. The rows for results.json go to FOLDER/rows.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from leanseek.bench.machine import cpu_name
from leanseek.errors import InputError, Interrupted, RunError
from leanseek.machine.device import preferred_dtype
from leanseek.reproduce.claims import ALONE, EXPERIMENTS, ROWS, Claim, fingerprint, seeded
from leanseek.training import train
from leanseek.training.metrics import read_rows
from leanseek.writing import replace_file

WINDOWS = 100  # points of a stored training curve


def work(arms: list[tuple[Claim, str]], seed: int, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Train the run that `arms` share, and measure it for each of their claims."""
    claim, arm = arms[0]
    run = seeded(claim.arms[arm], seed) if arm != ALONE else None
    if run is not None:
        run = dataclasses.replace(run, name=folder.name)
        train(run, resume=folder.exists(), runs=folder.parent)
    rows = []
    for claim, arm in arms:
        start = time.monotonic()
        measure = getattr(claim.script, "measure", None)
        measured = measure(run, folder if run else None, quick) if measure else {}
        row: dict[str, Any] = {
            "arm": arm, "seed": seed, "fingerprint": fingerprint(run) if run else ALONE, "measured": measured,
            "seconds": time.monotonic() - start, "machine": machine(), "commit": commit(), "curve": [], "loss": [],
        }  # fmt: skip
        if run is not None:
            row |= _curves(folder)
        rows.append(row)
    return rows


def _curves(folder: Path) -> dict[str, Any]:
    rows = read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if row.get("loss") is not None]
    width = max(1, len(trained) // WINDOWS)
    windows = [trained[i : i + width] for i in range(0, len(trained), width)]
    return {
        "curve": [
            [row["step"], row["tokens"], row["val_loss"], row["val_bits_per_byte"]]
            for row in rows
            if row.get("val_loss") is not None
        ],
        "loss": [[w[-1]["step"], round(sum(row["loss"] for row in w) / len(w), 6)] for w in windows],
        "seconds": trained[-1]["elapsed_s"],
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": str(preferred_dtype(torch.device("cpu"))).removeprefix("torch."),
    }  # fmt: skip


def commit() -> str:
    """Of the checkout, "+" behind it where it has changes."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=EXPERIMENTS, capture_output=True, encoding="utf-8", check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _line() -> bytes:
    """The first line of standard input."""
    found = b""
    while not found.endswith(b"\n") and (byte := os.read(0, 1)):
        found += byte
    return found


def _stop_with_parent() -> None:
    while os.read(0, 4096):  # not through sys.stdin, whose lock the interpreter wants at its end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    folder, quick = Path(sys.argv[1]), "--quick" in sys.argv
    job = json.loads(_line())
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    arms = [(Claim(Path(claim), quick), arm) for claim, arm in job["arms"]]
    try:
        rows = work(arms, job["seed"], folder, quick)
    except (InputError, RunError, Interrupted) as error:
        print(error, file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 1)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / ROWS, json.dumps(rows).encode())


if __name__ == "__main__":
    main()
