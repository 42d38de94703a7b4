"""A claim: a folder of experiments/ with its arms (arms.toml) and its script (claim.py).

The script has `judge(found) -> Verdict` and `draw(figure, found)`; with `measure(run, folder, quick) -> dict` it adds
figures of its own to a run that has ended. A claim without arms is measured alone: `run` and `folder` are None then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from pydantic import Field

from leanseek import planning
from leanseek.config import ConfigError, ModelConfig
from leanseek.errors import InputError
from leanseek.reading import Structure, checked, read_toml
from leanseek.training import RunConfig

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"
SEEDS = (0, 1, 2)
QUICK = 10  # --quick trains one step in ten
TOLERANCE = 0.015  # by which arms that should be equal may differ
ROWS = "rows.json"  # in the folder of a run: what it adds to results.json
ALONE = ""  # the arm of a claim that trains nothing

Word = Literal["held", "held in part", "not seen at this scale", "contradicted", "one seed alone", "not run"]


class Verdict(NamedTuple):
    word: Word
    ours: str  # our figures with their intervals, in a line
    text: str  # the paragraph: what was done, what came out, what did not


class _Equal(Structure):
    """Names of the arms that are equal in each."""

    parameters: list[str] = Field(default_factory=list)
    activated_parameters: list[str] = Field(default_factory=list)
    train_flops: list[str] = Field(default_factory=list)


class _File(Structure):
    """arms.toml."""

    title: str
    paper: str  # what the paper says, with its figure
    steps: int | None = None  # of every arm, where it is not base.toml's
    equal: _Equal = Field(default_factory=_Equal)
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """Raises InputError where arms.toml or claim.py cannot be used."""

    folder: Path
    quick: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def file(self) -> _File:
        path = self.folder / "arms.toml"
        return checked(_File, read_toml(path, ConfigError), str(path), ConfigError)

    @cached_property
    def script(self) -> ModuleType:
        path = self.folder / "claim.py"
        spec = importlib.util.spec_from_file_location(f"experiments.{self.name.replace('-', '_')}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise InputError(f"{path} is missing: a claim needs its script")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @cached_property
    def arms(self) -> dict[str, RunConfig]:
        """The run of each arm, seed 0: base.toml with what the arm changes, a tenth of the steps with `quick`."""
        base = read_toml(self.folder.parent / "base.toml", ConfigError)
        return {name: self._arm(base, name, changes) for name, changes in self.file.arms.items()}

    def _arm(self, base: dict[str, Any], name: str, changes: dict[str, Any]) -> RunConfig:
        table = {key: dict(value) for key, value in base.items()}
        if self.file.steps is not None:
            table["train"]["steps"] = self.file.steps
        for section, values in changes.items():
            table.setdefault(section, {}).update(values)
        run = RunConfig.from_dict(table | {"name": name})
        return _shortened(run) if self.quick else run

    def matched(self) -> list[dict[str, Any]]:
        """What each arm costs, a row an arm.

        Raises:
            ConfigError: arms that should be equal differ.
        """
        rows = {name: costs(run) for name, run in self.arms.items()}
        for what, names in self.file.equal.model_dump().items():
            found = [rows[name][what] for name in names]
            if found and max(found) > min(found) * (1 + TOLERANCE):
                raise ConfigError(f"{self.folder}/arms.toml: {', '.join(names)} differ in {what}: {found}")
        return [{"arm": name, **row} for name, row in rows.items()]


def costs(run: RunConfig) -> dict[str, Any]:
    model: ModelConfig = run.model
    return {
        "parameters": planning.parameters(model),
        "activated_parameters": planning.activated_parameters(model),
        "train_flops": planning.train_flops_per_token(model, run.data.seq_len),
        "cache_bytes": planning.kv_bytes_per_token(model),
    }


def _shortened(run: RunConfig) -> RunConfig:
    """A tenth of the steps, every schedule in proportion; four evaluations, on a quarter of the text."""
    steps, windows = max(1, run.train.steps // QUICK), max(1, run.train.eval_sequences // 4)
    train = dataclasses.replace(run.train, steps=steps, eval_every=max(1, steps // 4), eval_sequences=windows)
    warmup = dataclasses.replace(run.schedule, warmup_steps=run.schedule.warmup_steps // QUICK)
    return dataclasses.replace(run, train=train, schedule=warmup)


def seeded(run: RunConfig, seed: int) -> RunConfig:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, seed=seed))


def fingerprint(run: RunConfig) -> str:
    """Of all that decides a run's figures, so that claims share the runs that they have in common. What is at its
    default is left out: a setting that comes later changes no fingerprint."""
    sections = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    given = {
        section: {f.name: v for f in dataclasses.fields(value) if (v := getattr(value, f.name)) != f.default}
        for section, value in sections.items()
        if dataclasses.is_dataclass(value) and section not in ("checkpoint", "parallel")
    }
    given["data"].pop("path", None)
    return hashlib.sha256(json.dumps(given, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()[:12]


def find_claims(names: list[str], quick: bool = False) -> list[Claim]:
    """The named claims, or all.

    Raises:
        InputError: there is no such claim, or no experiments/ beside the package.
    """
    if not EXPERIMENTS.is_dir():
        raise InputError("the claims are part of a checkout: git clone the repository and run this in it")
    known = sorted(path.parent.name for path in EXPERIMENTS.glob("*/arms.toml"))
    for name in names:
        if name not in known:
            raise InputError(f"no claim {name!r}; there are {', '.join(known)}")
    return [Claim(EXPERIMENTS / name, quick) for name in names or known]
