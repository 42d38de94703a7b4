"""Runs what a claim still lacks: one-thread processes side by side, seed by seed, resumed where they were cut."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanseek.data.corpora import fetch
from leanseek.data.prepare import prepare
from leanseek.errors import InputError, Interrupted, RunError
from leanseek.machine.threads import cpus
from leanseek.planning import train_flops_per_token
from leanseek.reading import parse_json
from leanseek.reproduce.claims import ALONE, ROWS, SEEDS, Claim, fingerprint, seeded
from leanseek.reproduce.results import Found, add
from leanseek.signals import noted
from leanseek.training import RunConfig
from leanseek.writing import LOCK, alone

CORPUS = "english"
_LINE_EVERY = 60.0  # seconds between progress lines where there is no terminal


@dataclass
class Job:
    """A run, and the arms of claims that it is."""

    folder: Path
    seed: int
    run: RunConfig | None  # None: a claim that is measured without a run
    arms: list[tuple[Claim, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        claim, arm = self.arms[0]
        return f"{claim.name}{'/' if arm else ''}{arm} seed {self.seed}"

    @property
    def work(self) -> float:
        """FLOPs of its training: jobs of about the same length have about the same."""
        if self.run is None:
            return 0.0
        tokens = self.run.train.steps * self.run.train.batch_size * self.run.data.seq_len
        return tokens * train_flops_per_token(self.run.model, self.run.data.seq_len)

    @property
    def done(self) -> float:
        """The share of its steps that are done."""
        last = _last_line(self.folder / "metrics.jsonl") if self.run else b""
        with contextlib.suppress(InputError, KeyError, TypeError):
            return min(1.0, parse_json(last, "metrics")["step"] / self.run.train.steps)  # type: ignore[union-attr]
        return 0.0


def reproduce(claims: list[Claim], runs: Path, seeds: int = len(SEEDS), jobs: int | None = None) -> None:
    """Run what is missing of `claims`; their results.json grow as runs end (under `runs` with --quick).

    Raises:
        InputError: a claim's files contradict themselves, or another process reproduces in `runs`.
        RunError: a run failed; what others found is kept.
        Interrupted: SIGINT or SIGTERM; every run has saved its last step.
    """
    for claim in claims:
        _say_matched(claim)
    runs.mkdir(parents=True, exist_ok=True)
    with alone(runs / LOCK, InputError(f"{runs} is in use by another `leanseek reproduce`; wait for it")):
        missing = find_jobs(claims, runs, seeds)
        if any(job.run for job in missing):
            _prepare_data(missing)
        failed = _Pool(missing, jobs or cpus()).run(runs)
    if failed:
        raise RunError(f"{len(failed)} of {len(missing)} runs failed: {'; '.join(failed)}")


def find_jobs(claims: list[Claim], runs: Path, seeds: int = len(SEEDS)) -> list[Job]:
    """What is missing, all claims' first seed first. Claims share the runs that they have in common."""
    found: dict[tuple[str, int], Job] = {}
    known = {claim.name: Found(claim, results_path(claim, runs)) for claim in claims}
    for seed in SEEDS[:seeds]:
        for claim in claims:
            arms: dict[str, RunConfig | None] = {**claim.arms} or {ALONE: None}
            for arm, run in arms.items():
                if known[claim.name].has(arm, seed):
                    continue
                own = seeded(run, seed) if run else None
                key = fingerprint(own) if own else claim.name
                name = f"{arm}-{seed}-{key}" if own else f"{claim.name}-{seed}"
                found.setdefault((key, seed), Job(runs / name, seed, own)).arms.append((claim, arm))
    return list(found.values())


def results_path(claim: Claim, runs: Path) -> Path:
    return runs / f"{claim.name}.json" if claim.quick else claim.folder / "results.json"


def _say_matched(claim: Claim) -> None:
    for row in claim.matched():
        print(
            f"{claim.name}: {row['arm']:<16} {row['parameters']:>12,} parameters, {row['activated_parameters']:>11,} "
            f"activated, {row['train_flops'] / 1e6:>6.1f} MFLOP and {row['cache_bytes']:>6,} cache bytes per token",
            file=sys.stderr,
        )


def _prepare_data(jobs: list[Job]) -> None:
    """Fetch and tokenize the corpus if its shards are missing."""
    run = next(job.run for job in jobs if job.run)
    shards = Path(run.data.path)
    if shards.exists():
        return
    texts = Path("corpora") / CORPUS
    if not texts.exists():
        texts.parent.mkdir(parents=True, exist_ok=True)
        fetch(CORPUS, texts)
    prepare([texts], shards, train_vocab=run.model.vocab_size)


# ---- processes side by side ----


class _Pool:
    def __init__(self, jobs: list[Job], width: int):
        self.jobs, self.width = jobs, width
        self.waiting, self.running = list(jobs), dict[subprocess.Popen[bytes], Job]()
        self.began, self.at_start = time.monotonic(), sum(job.work * job.done for job in jobs)
        self.said = -_LINE_EVERY
        self.failed: list[str] = []

    def run(self, runs: Path) -> list[str]:
        """Work through the jobs; what failed, a line each."""
        with noted() as received:
            try:
                while self.waiting or self.running:
                    if received:
                        raise Interrupted("stopped; the same command goes on where this one was")
                    while self.waiting and len(self.running) < self.width:
                        job = self.waiting.pop(0)
                        self.running[_start(job)] = job
                    for process in [p for p in self.running if p.poll() is not None]:
                        self._ended(self.running.pop(process), process.returncode, runs)
                    self._say()
                    time.sleep(0.5)
            finally:
                for process in self.running:  # at the end of its input, a run saves its last step
                    assert process.stdin
                    process.stdin.close()
                for process in self.running:
                    process.wait()
        self._say(end=True)
        return self.failed

    def _ended(self, job: Job, code: int, runs: Path) -> None:
        path = job.folder / ROWS
        if code or not path.exists():
            words = _last_line(_log(job)).decode(errors="replace")
            self.failed.append(f"{job.name}: {words or f'ended with {code}'}")
            return
        rows: list[dict[str, Any]] = json.loads(path.read_bytes())
        for (claim, _), row in zip(job.arms, rows, strict=True):
            add(results_path(claim, runs), [row])

    def _say(self, end: bool = False) -> None:
        """One line: how many runs are done, how far those are that run, and about how long it takes yet."""
        terminal = sys.stderr.isatty()
        if not end and not terminal and time.monotonic() - self.said < _LINE_EVERY:
            return
        self.said = time.monotonic()
        ended = len(self.jobs) - len(self.waiting) - len(self.running)
        line = f"{ended} of {len(self.jobs)} runs"
        line += "".join(f" · {job.name} {job.done:.0%}" for job in self.running.values())
        print(f"\r\x1b[K{line}{self._left()}" if terminal else f"{line}{self._left()}", end="\n" if end or not terminal
              else "", file=sys.stderr, flush=True)  # fmt: skip

    def _left(self) -> str:
        waiting = {id(job) for job in self.waiting}
        done = sum(job.work * (0.0 if id(job) in waiting else job.done) for job in self.jobs)
        whole, seconds = sum(job.work for job in self.jobs), time.monotonic() - self.began
        if not self.running or done - self.at_start < 0.002 * whole:
            return ""
        minutes = (whole - done) / (done - self.at_start) * seconds / 60
        return f" · about {minutes / 60:.0f} h {minutes % 60:.0f} min left" if minutes > 60 else f" · {minutes:.0f} min"


def _start(job: Job) -> subprocess.Popen[bytes]:
    arms = [[str(claim.folder), arm] for claim, arm in job.arms]
    quick = ["--quick"] * job.arms[0][0].quick
    command = [sys.executable, "-m", "leanseek.reproduce.worker", str(job.folder), *quick]
    with _log(job).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
    assert process.stdin
    process.stdin.write(json.dumps({"arms": arms, "seed": job.seed}).encode() + b"\n")
    process.stdin.flush()
    return process


def _log(job: Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.log")


def _last_line(path: Path) -> bytes:
    """Of a file that is being written; b"" if there is none."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return next((line for line in reversed(file.read().split(b"\n")[:-1]) if line.strip()), b"")
