"""What the runs of a claim have found: experiments/NAME/results.json, which is added to and never overwritten."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from leanseek.errors import InputError
from leanseek.reading import Structure, checked, parse_json, read_bytes
from leanseek.reproduce.claims import ALONE, SEEDS, Claim, fingerprint, seeded
from leanseek.writing import alone, replace_file

_LARGEST = 2**28  # bytes of a results.json

# t of Student's distribution at 97.5 %, by degrees of freedom from 1
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval; without a second seed the interval is the whole line."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Mean and half of the interval, each by `spec`; a + is the mean's."""
        half = (self.high - self.low) / 2
        mean = format(self.mean, spec) if spec else _short(self.mean)
        if math.isinf(half):
            return f"{mean} (one seed)"
        return f"{mean} ± {format(half, spec.lstrip('+')) if spec else _short(half)}"

    def __str__(self) -> str:
        return format(self)

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval is below or above 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"


def interval(values: list[float]) -> Interval:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    t = _T[min(len(values) - 2, len(_T) - 1)]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


class Run(Structure):
    """One arm under one seed: a row of results.json."""

    arm: str
    seed: int
    fingerprint: str  # of the run, as arms.toml described it then
    curve: list[list[float]]  # an evaluation each: step, tokens, validation loss, bits per byte
    loss: list[list[float]]  # training loss: the last step of a window, and the window's mean
    measured: dict[str, Any]  # by the claim's script
    seconds: float
    machine: dict[str, Any]
    commit: str


def bits(run: Run) -> float:
    """Bits per byte of the validation split at the end."""
    return run.curve[-1][3]


class Found:
    """The runs of a claim that its arms.toml describes today, by arm and seed."""

    def __init__(self, claim: Claim, path: Path):
        self.claim = claim
        self.runs: dict[str, dict[int, Run]] = {arm: {} for arm in claim.arms or [ALONE]}
        wanted = {(arm, seed): fingerprint(seeded(run, seed)) for arm, run in claim.arms.items() for seed in SEEDS} or {
            (ALONE, seed): ALONE for seed in SEEDS
        }
        measures = hasattr(claim.script, "measure")
        for row in read(path):
            if wanted.get((row.arm, row.seed)) == row.fingerprint and bool(row.measured) == measures:
                self.runs[row.arm][row.seed] = row

    @property
    def seeds(self) -> list[int]:
        """Seeds that every arm has."""
        return [seed for seed in SEEDS if all(seed in runs for runs in self.runs.values())]

    def has(self, arm: str, seed: int) -> bool:
        return seed in self.runs[arm]

    def each(self, arm: str, figure: Callable[[Run], float]) -> list[float]:
        """A figure of the arm's runs, seed by seed."""
        return [figure(self.runs[arm][seed]) for seed in self.seeds]

    def mean(self, arm: str, figure: Callable[[Run], float]) -> Interval:
        return interval(self.each(arm, figure))

    def listed(self, figure: Callable[[Run], float]) -> str:
        """Every arm with its mean, in words."""
        return ", ".join(f"{arm} {self.mean(arm, figure)}" for arm in self.runs)

    def difference(self, arm: str, other: str, figure: Callable[[Run], float]) -> Interval:
        """arm - other, paired by seed: both saw the same text in the same order."""
        pairs = zip(self.each(arm, figure), self.each(other, figure), strict=True)
        return interval([a - b for a, b in pairs])

    @property
    def hours(self) -> float:
        return sum(run.seconds for runs in self.runs.values() for run in runs.values()) / 3600


class _File(Structure):
    runs: list[Run]


def read(path: Path) -> list[Run]:
    """Raises InputError: it is not a results.json."""
    if not path.exists():
        return []
    return checked(_File, parse_json(read_bytes(path, limit=_LARGEST), str(path)), str(path), InputError).runs


def add(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a results.json; what it holds stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.with_name(f".{path.name}.lock"), InputError(f"{path} is being written by another process")):
        kept = [row.model_dump() for row in read(path)]
        lines = ",\n".join(json.dumps(row) for row in [*kept, *rows])
        replace_file(path, f'{{"runs": [\n{lines}\n]}}\n'.encode())
