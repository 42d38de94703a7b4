"""Sides of a comparison leave nothing behind: what a peer's own worker holds would slow down whatever is timed next."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from leanseek.bench.workers import Worker

PARENT = """
import json, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({"child": child.pid}), flush=True)
sys.stdin.read()
"""


def test_closing_ends_what_the_worker_started() -> None:
    worker = Worker([sys.executable, "-c", PARENT])
    child = Path(f"/proc/{worker.ready['child']}/stat")
    assert child.exists()
    worker.close()
    until = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert not child.exists() or child.read_text().split()[2] == "Z"
