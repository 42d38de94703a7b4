"""Runs one reward function. As a script it is the reward's process: a grader that hangs or dies takes nothing along.

Functions are TRL's (lists in, numbers or None out) or verl's `compute_score`, which is recognised by its parameters.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from leanseek.errors import InputError

_GIVEN = ("prompts", "completions", "completion_ids")
_VERL = {"solution_str", "ground_truth"}  # the parameters by which verl's signature is known
_ALARM_MARGIN_S = 2  # after the limit, in case the process that sets the limit is gone


class Grader:
    """A reward function, loaded.

    by_row: it is called for one row at a time. needs: columns that it cannot do without.

    Raises:
        InputError: there is no such function, or it does not take the arguments.
    """

    def __init__(self, source: str, arguments: Mapping[str, Any]):
        self._function, self.by_row = _load(source)
        self._arguments = dict(arguments)
        try:
            signature = inspect.signature(self._function).parameters.values()
        except (TypeError, ValueError):
            raise InputError(f"{source} is not a function with a readable signature") from None
        named = {p.name: p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._any = any(p.kind is p.VAR_KEYWORD for p in signature)
        self._names = set(named)
        self._verl = named.keys() >= _VERL
        self.by_row |= self._verl
        if unknown := sorted(arguments.keys() - self._names) if not self._any else []:
            raise InputError(f"{source} takes no argument {unknown[0]!r}; it takes {', '.join(named)}")
        if (prepare := _prepares(source)) is not None:
            if "path" not in arguments:
                raise InputError(f"{source} needs path: arguments = {{ path = ... }}, a run or a folder")
            prepare(arguments["path"])
        given = {*_GIVEN, *arguments, *(("solution_str", "extra_info", "ground_truth") if self._verl else ())}
        self.needs = [p.name for p in named.values() if p.default is p.empty and p.name not in given]

    def score(self, rows: Mapping[str, list[Any]]) -> list[float | None]:
        """Scores of rows, given as lists by name.

        Raises:
            InputError: the function returned something else, or needs a column that is not there.
        """
        count = len(rows["completions"])
        found = asyncio.run(self._verl_scores(rows)) if self._verl else self._scores(rows)
        try:
            values = list(found)
        except TypeError:
            raise InputError(f"it returned {type(found).__name__}, not a list of {count} numbers") from None
        if len(values) != count:
            raise InputError(f"it returned {len(values)} scores for {count} completions")
        return [_number(value) for value in values]

    def _scores(self, rows: Mapping[str, list[Any]]) -> Any:
        given = {name: values for name, values in rows.items() if self._any or name in self._names}
        found = self._function(**given | self._arguments)
        return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found

    async def _verl_scores(self, rows: Mapping[str, list[Any]]) -> list[Any]:
        """verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`, a row at a time."""
        scores = []
        for number, completion in enumerate(rows["completions"]):
            row = {name: values[number] for name, values in rows.items()}
            row["solution_str"] = completion if isinstance(completion, str) else completion[-1]["content"]
            row.setdefault("extra_info", None)
            if "ground_truth" not in row:
                row["ground_truth"] = (row.get("reward_model") or {}).get("ground_truth")
            if row["ground_truth"] is None:
                raise InputError("it needs a column reward_model.ground_truth or ground_truth in each row")
            given = {name: value for name, value in row.items() if name in self._names}
            found = self._function(**given | self._arguments)
            found = await found if inspect.isawaitable(found) else found
            scores.append(found["score"] if isinstance(found, dict) and "score" in found else found)
        return scores


async def _awaited(found: Any) -> Any:
    return await found


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise InputError(f"it returned {_short(repr(value))}, not a number or None") from None
    if not math.isfinite(found):
        raise InputError(f"it returned {found}; a reward that does not apply returns None")
    return found


def _load(source: str) -> tuple[Callable[..., Any], bool]:
    """The function that `name`, `file.py:function` or `package.module:function` names, and whether it grades by row."""
    place, colon, name = source.rpartition(":")
    if not colon:
        from leanseek.posttraining import graders

        if source not in graders.BUILT_IN:
            raise InputError(
                f"no built-in reward {source!r}; there are {', '.join(graders.BUILT_IN)}, and file.py:function or "
                "package.module:function for others"
            )
        return graders.BUILT_IN[source], source in graders.BY_ROW
    module = _module_of_file(Path(place)) if place.endswith(".py") else _installed(place)
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found) or inspect.isclass(found):
        what = "a class; name an instance of it" if inspect.isclass(found) else "nothing that can be called"
        raise InputError(f"{source}: {name!r} is {what}")
    return found, False


def _prepares(source: str) -> Callable[[str], Any] | None:
    """What a built-in loads before its first call, which that call's time limit does not cover."""
    if ":" in source:
        return None
    from leanseek.posttraining import graders

    return graders.PREPARE.get(source)


def _module_of_file(path: Path) -> Any:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    sys.path.insert(0, str(path.parent))  # it may import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def _installed(name: str) -> Any:
    sys.path.append(os.getcwd())  # after what is installed
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(f"no module {error.name!r} is installed here") from None
        raise


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _told(error: BaseException) -> str:
    """One line on an exception: its kind, text, and the line of the user's code that raised it."""
    if isinstance(error, InputError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {_short(message)} ({Path(last.filename).name}:{last.lineno})"


def _main() -> None:
    """Lines of JSON: first {source, arguments} in and {needs, by_row} out; then {rows, seconds} in and {scores} out,
    repeatedly. Anything may answer {error, refused}."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a function prints is seen, and is no answer
    sys.stdout = sys.stderr
    grader: Grader | None = None
    for line in sys.stdin:
        message = json.loads(line)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even if its parent is gone
        signal.setitimer(signal.ITIMER_REAL, message["seconds"] + _ALARM_MARGIN_S)
        try:
            if grader is None:
                grader = Grader(message["source"], message["arguments"])
                answer: dict[str, Any] = {"needs": grader.needs, "by_row": grader.by_row}
            else:
                answer = {"scores": grader.score(message["rows"])}
        except Exception as error:
            answer = {"error": _told(error), "refused": isinstance(error, InputError)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
