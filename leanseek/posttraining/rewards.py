"""Rewards: functions that score completions, each in a process of its own with a time limit.

They are written as for TRL (`f(prompts, completions, completion_ids, **columns) -> list[float | None]`, also async) or
as for verl (`compute_score(data_source, solution_str, ground_truth, extra_info)`). None abstains.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from leanseek.engine import Child
from leanseek.errors import InputError, RunError
from leanseek.machine.threads import cpus
from leanseek.posttraining import reward_worker
from leanseek.reading import shorten

OPENING_S = 120.0  # for what a function's module imports
MAX_HUNG = 3  # rows of a call that may hang before the others abstain too
MAX_LANES = 4  # processes of a reward that is called row by row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardConfig:
    """A table of `[[rewards]]`."""

    function: str  # a built-in's name, file.py:function or package.module:function
    name: str = ""  # in metrics; the function's own if empty
    weight: float = 1.0
    seconds: float = 30.0  # time limit of a call, or of a row where the function takes one row at a time
    arguments: Mapping[str, Any] = field(default_factory=dict)  # passed by keyword to every call

    def __post_init__(self) -> None:
        if not self.function:
            raise InputError("a reward needs function = a built-in's name, file.py:function or package.module:function")
        if not self.name:
            object.__setattr__(self, "name", self.function.rpartition(":")[2].rpartition(".")[2])
        if not math.isfinite(self.weight):
            raise InputError(f"rewards.{self.name}: weight = {self.weight} must be a finite number")
        if not 0 < self.seconds <= 86_400:
            raise InputError(f"rewards.{self.name}: seconds = {self.seconds:g} must be positive and at most a day")


def read_rewards(tables: object) -> tuple[RewardConfig, ...]:
    """The `[[rewards]]` of a TOML file; names must differ.

    Raises:
        InputError: a key or value is wrong.
    """
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError("rewards must be an array of tables: [[rewards]]")
    found = tuple(_reward(table) for table in tables)
    names = [reward.name for reward in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two rewards are called {shorten(repr(twice))}; give each a name = of its own")
    return found


def _reward(table: dict[str, Any]) -> RewardConfig:
    kinds: dict[str, tuple[type, ...]] = {
        "function": (str,), "name": (str,), "weight": (float, int), "seconds": (float, int), "arguments": (dict,),
    }  # fmt: skip
    for key, value in table.items():
        if key not in kinds:
            raise InputError(f"[[rewards]] has no key {shorten(repr(key))}; there are {', '.join(kinds)}")
        if isinstance(value, bool) or not isinstance(value, kinds[key]):
            raise InputError(f"rewards.{key} must be {kinds[key][0].__name__}, not {shorten(repr(value))}")
    return RewardConfig(**{"function": ""} | table)


class Reward:
    """One reward function in its process. Close it, or use it in `with`.

    needs: columns without which it cannot be called

    Raises:
        InputError: there is no such function, its module does not import, or it does not take the arguments.
    """

    def __init__(self, settings: RewardConfig):
        self.settings, self.name, self.weight = settings, settings.name, settings.weight
        self._lock = threading.Lock()
        self._children: set[Child] = set()
        self._idle: list[Child] = []
        weakref.finalize(self, _end_all, self._children)  # runs at the interpreter's exit too
        child, opened = self._start()
        self._idle.append(child)
        self.needs: list[str] = opened["needs"]
        self._by_row: bool = opened["by_row"]

    def check(self, columns: Collection[str]) -> None:
        """Raises InputError if rows with these columns lack one that the function needs."""
        if taken := sorted({"prompts", "completions", "completion_ids"} & set(columns)):
            raise InputError(
                f"the rows have a column {taken[0]!r}, a name that rewards use for something else; rename it"
            )
        if missing := [name for name in self.needs if name not in columns]:
            there = ", ".join(sorted(columns)) or "none"
            raise InputError(f"the reward {self.name} needs a column {missing[0]!r}; the rows have {there}")

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """A score of each completion; None where the function abstains or did not end in time, which is logged by name.

        After a prompt of messages, the function gets the completion as a list of one message, as in TRL.

        Raises:
            InputError: a column is missing, or the function returned something else.
            RunError: the function failed, or not one row ended in time.
        """
        self.check(columns)
        shaped = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        rows = {
            **columns,
            "prompts": list(prompts),
            "completions": shaped,
            "completion_ids": [list(ids) for ids in completion_ids],
        }
        if not completions:
            return []
        if not self._by_row:
            found = self._ask(rows)
            if not isinstance(found, str):
                return found
            log.warning("the reward %s %s with %d completions; now each alone", self.name, found, len(completions))
        return self._row_by_row(rows, len(completions))

    def _row_by_row(self, rows: Mapping[str, Sequence[Any]], count: int) -> list[float | None]:
        """Scores of single rows, so that those that hang are found, and do not take the others along."""
        hung: list[tuple[int, str]] = []

        def one(number: int) -> list[float | None]:
            if len(hung) >= MAX_HUNG:
                return [None]
            found = self._ask({name: [values[number]] for name, values in rows.items()})
            if not isinstance(found, str):
                return found
            hung.append((number, found))
            return [None]

        lanes = min(MAX_LANES, cpus(), count) if self._by_row else 1
        with ThreadPoolExecutor(lanes) as pool:
            scores = [score for part in pool.map(one, range(count)) for score in part]
        if hung:
            number, why = hung[0]
            said = shorten(str(rows["completions"][number]), 80)
            if len(hung) >= min(count, MAX_HUNG) and all(score is None for score in scores):
                raise RunError(f"the reward {self.name} {why} at each of {len(hung)} completions, the first: {said}")
            left = f"; after {len(hung)} such rows the others abstain too" if len(hung) >= MAX_HUNG else ""
            log.warning("the reward %s %s at a completion, which abstains%s: %s", self.name, why, left, said)
        return scores

    def _ask(self, rows: Mapping[str, Sequence[Any]]) -> list[float | None] | str:
        """Scores, or in words why there are none."""
        with self._lock:
            child = self._idle.pop() if self._idle else None
        child = child or self._start()[0]
        answer, late = self._converse(child, {"rows": rows, "seconds": self.settings.seconds})
        if answer is None:
            return f"took more than {self.settings.seconds:g} s" if late else "ended its own process"
        with self._lock:
            self._idle.append(child)
        if "error" in answer:
            raise (InputError if answer["refused"] else RunError)(f"the reward {self.name}: {answer['error']}")
        scores: list[float | None] = answer["scores"]
        return scores

    def _start(self) -> tuple[Child, dict[str, Any]]:
        child = Child(reward_worker.__file__, errors=None)
        with self._lock:
            self._children.add(child)
        asked = {"source": self.settings.function, "arguments": dict(self.settings.arguments), "seconds": OPENING_S}
        answer, late = self._converse(child, asked)
        if answer is None:
            answer = {"error": f"took more than {OPENING_S:g} s to load" if late else "ended its process while loading"}
        if "error" in answer:
            self._end(child)
            raise InputError(f"the reward {self.name}: {answer['error']}")
        return child, answer

    def _converse(self, child: Child, message: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
        """The answer, None if there is none, and whether that is because its time was up."""
        late = threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        try:
            line = json.dumps(message) + "\n"
        except (TypeError, ValueError) as error:
            self._end(child)
            raise InputError(f"the reward {self.name}: a column holds what JSON cannot ({error})") from None
        timer = threading.Timer(message["seconds"], end)
        timer.start()
        try:
            answer = child.ask(line)
        except BaseException:  # Ctrl-C
            self._end(child)
            raise
        finally:
            timer.cancel()
        if answer is None:
            self._end(child)
        return answer, late.is_set()

    def _end(self, child: Child) -> None:
        child.end()
        with self._lock:
            self._children.discard(child)

    def close(self) -> None:
        """End its processes."""
        with self._lock:
            children, self._idle = list(self._children), []
        for child in children:
            self._end(child)

    def __enter__(self) -> Reward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_all(children: set[Child]) -> None:
    for child in children:
        child.end()


class Scores(NamedTuple):
    """Of each completion: the weighted sum of the rewards that did not abstain, None if all did; and each by name."""

    total: list[float | None]
    by_name: dict[str, list[float | None]]


class Rewards:
    """Several rewards, scored at the same time.

    Raises:
        InputError: as Reward, or there is none.
    """

    def __init__(self, settings: Sequence[RewardConfig]):
        if not settings:
            raise InputError("there is no reward: add [[rewards]] with function = ...")
        self.rewards: list[Reward] = []
        try:
            for one in settings:
                self.rewards.append(Reward(one))
        except BaseException:
            self.close()
            raise

    def check(self, columns: Collection[str]) -> None:
        """Raises InputError if rows with these columns lack one that a reward needs."""
        for reward in self.rewards:
            reward.check(columns)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> Scores:
        """As Reward.score, of all."""
        with ThreadPoolExecutor(len(self.rewards)) as pool:
            jobs = [pool.submit(r.score, prompts, completions, completion_ids, **columns) for r in self.rewards]
            by_name = {reward.name: job.result() for reward, job in zip(self.rewards, jobs, strict=True)}
        weights = [reward.weight for reward in self.rewards]
        total: list[float | None] = []
        for each in zip(*by_name.values(), strict=True):
            known = [weight * score for weight, score in zip(weights, each, strict=True) if score is not None]
            total.append(math.fsum(known) if known else None)
        return Scores(total, by_name)

    def close(self) -> None:
        """End their processes."""
        for reward in self.rewards:
            reward.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reward_tables(settings: Sequence[RewardConfig]) -> list[dict[str, Any]]:
    """The inverse of `read_rewards`, for a resolved configuration."""
    return [dataclasses.asdict(one) for one in settings]
