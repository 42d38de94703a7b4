"""The built-in rewards. Called as any other: by keyword, with lists.

Nothing here evaluates what a model wrote, except `code`, which runs it in a process with limits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

from leanseek.errors import InputError

if TYPE_CHECKING:
    from leanseek.posttraining.judge import Judge
    from leanseek.posttraining.reward_model import RewardModel

OPEN, CLOSE = "<think>", "</think>"
MAX_NUMBER = 100  # characters of a number; what is longer is compared as text
MAX_EXPONENT = 300

_MARKS = re.compile(r"</?(?:think|answer)>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LEAD = re.compile(
    r"^(?:so |thus |therefore,? |hence,? )?(?:the )?(?:final )?answer\b(?: is\b)?\s*[:=]?\s*", re.IGNORECASE
)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_FRACTION = re.compile(r"([+-]?\d+)/(\d+)|([+-]?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_BOX = re.compile(r"\\f?boxed\s*\{")
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def text_of(completion: Any) -> str:
    """The text of a completion, which is a string or, after a prompt of messages, a list of one message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"] or "")


# ---- answer ----


def answer(
    completions: Sequence[Any],
    answer: Sequence[Any] | None = None,
    ground_truth: Sequence[Any] | None = None,
    reward_model: Sequence[Mapping[str, Any]] | None = None,
) -> list[float]:
    r"""1 where the answer equals the row's `answer`, `ground_truth` or verl's `reward_model.ground_truth`, else 0.

    The answer is what `final_answer` finds; `same` says what is equal. A list of truths accepts any of them.
    """
    truths = answer if answer is not None else ground_truth
    if truths is None and reward_model is not None:
        truths = [model.get("ground_truth") for model in reward_model]
    if truths is None or any(truth is None for truth in truths):
        raise InputError(
            "the reward answer needs a column answer, ground_truth or reward_model.ground_truth in each row"
        )
    scores = []
    for completion, truth in zip(completions, truths, strict=True):
        found = final_answer(text_of(completion))
        accepted = truth if isinstance(truth, list) else [truth]
        scores.append(float(found is not None and any(same(found, _bare(str(value))) for value in accepted)))
    return scores


def final_answer(text: str) -> str | None:
    r"""The one answer that a text commits to, else None.

    What stands after `</think>` counts; a thought that does not end has no answer, and marks that repeat or do not
    match make none. Of that, the content of `<answer>` or `\boxed{}`, or what follows `####`; without such a mark all
    of it, but for a lead such as "The answer is" and a full stop. Two marked answers are none.
    """
    marks = _MARKS.findall(text)
    if CLOSE in marks or OPEN in marks:
        if marks.count(CLOSE) != 1 or marks.count(OPEN) > 1 or (OPEN in marks and text.find(OPEN) > text.find(CLOSE)):
            return None
        text = text.partition(CLOSE)[2]
    tagged = marks.count("<answer>"), marks.count("</answer>")
    if tagged != (0, 0):
        found = _ANSWER.findall(text)
        if tagged != (1, 1) or len(found) != 1:
            return None
        text = found[0]
    boxes = _boxes(text)
    if len(boxes) > 1 or (boxes and boxes[0] is None):
        return None
    if boxes:
        return _bare(boxes[0] or "")
    if "####" in text:
        if text.count("####") > 1:
            return None
        text = text.partition("####")[2].strip().partition("\n")[0]
    return _bare(_LEAD.sub("", text.strip(), count=1)) or None


def _boxes(text: str) -> list[str | None]:
    r"""The contents of each `\boxed{…}`, braces balanced; None for one that does not end."""
    found: list[str | None] = []
    end = 0
    while match := _BOX.search(text, end):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found.append(None if depth else text[match.end() : end - 1])
    return found


def _bare(text: str) -> str:
    """Without what does not change an answer: dollar signs around it, bold, blanks, a full stop."""
    text = text.strip().removesuffix(".").strip()
    for mark in ("$$", "$", "**", r"\(", r"\["):
        end = {r"\(": r"\)", r"\[": r"\]"}.get(mark, mark)
        if len(text) > len(mark) + len(end) and text.startswith(mark) and text.endswith(end):
            text = text[len(mark) : -len(end)].strip()
    return text.removesuffix(".").strip()


def same(one: str, other: str) -> bool:
    """Whether two answers are equal: as exact numbers if both are, else as text without regard to case and blanks."""
    numbers = number(one), number(other)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    return _plain(one) == _plain(other)


def number(text: str) -> Fraction | None:
    r"""The exact value of `1,234`, `-.5`, `1e3`, `$5`, `3/4`, `\frac{3}{4}`, `50%` (50); None if it is no number."""
    text = text.strip().replace("\u2212", "-").replace(r"\$", "$").replace(r"\%", "%").replace(r"\,", "")
    text = text.removesuffix("%").strip()
    text = text[0] + text[2:] if text[:2] in ("-$", "+$") else text.removeprefix("$").strip()
    if not text or len(text) > MAX_NUMBER:
        return None
    if match := _FRACTION.fullmatch(text.replace(" ", "")):
        above, below = (match[1], match[2]) if match[1] else (match[3] + match[4], match[5])
        if above[:2] in ("--", "+-"):
            above = above[2:] if above[0] == "-" else above[1:]
        return Fraction(int(above), int(below)) if int(below) else None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if not _DECIMAL.fullmatch(text):
        return None
    try:
        value = Decimal(text)
    except InvalidOperation:  # an exponent beyond what decimal holds
        return None
    return Fraction(value) if abs(value.adjusted()) <= MAX_EXPONENT else None


def _plain(text: str) -> str:
    return re.sub(r"\s+|\\[,;! ]", "", text).casefold()


# ---- format, length ----


def format(completions: Sequence[Any], opened: bool = False) -> list[float]:
    """1 for `<think>thought</think>answer`, each mark once, neither part blank; else 0.

    opened: the chat template has written `<think>` already, so the completion begins with the thought
    """
    return [float(_is_formed(text_of(completion), opened)) for completion in completions]


def _is_formed(text: str, opened: bool) -> bool:
    if (text.count(OPEN), text.count(CLOSE)) != (int(not opened), 1):
        return False
    before, _, rest = text.partition(CLOSE)
    if not opened:
        lead, _, before = before.partition(OPEN)
        if lead.strip() or OPEN not in text.partition(CLOSE)[0]:
            return False
    return bool(before.strip() and rest.strip())


def length(completion_ids: Sequence[Sequence[int]], limit: int, buffer: int) -> list[float]:
    """A soft limit (DAPO, eq. 13): 0 up to `limit - buffer` tokens, falling to -1 at `limit`, -1 beyond."""
    if not 0 < buffer <= limit:
        raise InputError(f"the reward length takes 0 < buffer <= limit, not buffer = {buffer}, limit = {limit}")
    return [min(0.0, max(-1.0, (limit - buffer - len(ids)) / buffer)) for ids in completion_ids]


# ---- code ----


def code(completions: Sequence[Any], tests: Sequence[str | list[str]], seconds: float = 5) -> list[float]:
    """1 where the answer's last block of Python and the row's `tests` (a text or a list of asserts) run to their end.

    seconds: CPU time of a program
    """
    from leanseek.evaluation.execution import passes

    scores = []
    for completion, wanted in zip(completions, tests, strict=True):
        checks = wanted if isinstance(wanted, str) else "\n".join(wanted)
        if not checks.strip():
            raise InputError("the reward code needs tests in each row; one has none")
        text = text_of(completion).rpartition(CLOSE)[2]
        blocks = _CODE.findall(text)
        scores.append(float(passes(f"{blocks[-1] if blocks else text}\n{checks}\n", seconds)))
    return scores


# ---- reasoning-gym ----


def reasoning_gym(
    completions: Sequence[Any], answer: Sequence[Any], metadata: Sequence[Mapping[str, Any]]
) -> list[float]:
    """The score of reasoning-gym's own grader for rows that it generated (`question`, `answer`, `metadata`)."""
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError:
        raise InputError("this reward needs the package reasoning-gym: pip install 'leanseek[reasoning]'") from None
    scores = []
    for completion, truth, about in zip(completions, answer, metadata, strict=True):
        if not isinstance(about, dict) or "source_dataset" not in about:
            raise InputError("the reward reasoning_gym needs metadata.source_dataset in each row")
        grade = get_score_answer_fn(about["source_dataset"])
        found = final_answer(text_of(completion))
        scores.append(float(grade(answer=found, entry={"answer": truth, "metadata": about})))
    return scores


# ---- models ----


def model(prompts: Sequence[Any], completions: Sequence[Any], path: str) -> list[float]:
    """The score of a reward model: the run or folder at `path`, made by `leanseek reward`."""
    return _reward_model(path).score(prompts, completions)


@cache
def _reward_model(path: str) -> RewardModel:
    from leanseek.posttraining.reward_model import RewardModel

    return RewardModel(path)


QUESTION = """Question: {prompt}

Reference answer: {reference}

Answer to judge: {answer}

Does the answer to judge agree with the reference answer? Reply with yes or no."""


def judge(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    path: str,
    answer: Sequence[Any] | None = None,
    ground_truth: Sequence[Any] | None = None,
    question: str = QUESTION,
    yes: str = "yes",
    no: str = "no",
) -> list[float]:
    """P(yes) of the model at `path`, asked whether an answer agrees with the row's `answer` or `ground_truth`.

    question: what it is asked, with {prompt}, {reference} and {answer}. Its reply is `yes` or `no`, and P(yes) is that
    of yes against no.
    """
    truths = answer if answer is not None else ground_truth
    if truths is None or any(truth is None for truth in truths):
        raise InputError("the reward judge needs a column answer or ground_truth in each row")
    asked = []
    for prompt, completion, truth in zip(prompts, completions, truths, strict=True):
        last = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        said = text_of(completion).rpartition(CLOSE)[2].strip()
        asked.append(question.replace("{prompt}", last).replace("{reference}", str(truth)).replace("{answer}", said))
    return _judge(path).agree(asked, yes, no)


@cache
def _judge(path: str) -> Judge:
    from leanseek.posttraining.judge import Judge

    return Judge(path)


BUILT_IN = {grade.__name__: grade for grade in (answer, format, length, code, reasoning_gym, model, judge)}
PREPARE = {"model": _reward_model, "judge": _judge}  # what is loaded once, by path, before the first call
BY_ROW = frozenset({"code"})  # each row has the time limit to itself
