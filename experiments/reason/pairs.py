"""What the reward model of `make reason` learns from: right answers to sums beside wrong ones, and before that
exercises in which columns are judged (docs/log.md)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data import CLOSE, THINK, Operands, column, columns, draw, long_answer, problem, prompt, write_rows

VERDICTS = {True: " yes", False: " no"}


def off(chance: random.Random, total: int) -> int:
    return total + chance.choice([by for by in (-2, -1, 1, 2) if total + by >= 0])


def walk(chance: random.Random, operands: Sequence[int], wrong: Sequence[bool]) -> tuple[list[str], str]:
    """The columns of a sum and the answer they end in. Those in which `wrong` is True have a mistake, which is carried
    on: the carry forgotten, or a total a little off."""
    carry, lines, digits = 0, list[str](), ""
    for place, bad in enumerate(wrong):
        forgotten = bad and carry > 0 and chance.random() < 0.3
        terms = [0 if forgotten else carry, *(n // 10**place % 10 for n in operands)]
        total = off(chance, sum(terms)) if bad and not forgotten else sum(terms)
        lines.append(column(terms, total))
        digits, carry = str(total % 10) + digits, total // 10
    return lines, str(int(f"{carry}{digits}"))


# ---- pairs ----


def wrong_short(chance: random.Random, operands: Sequence[int]) -> str:
    """A sum with one digit changed, or off by a carry: as many digits as the right one."""
    right = str(sum(operands))
    while True:
        if chance.random() < 0.5:
            place = chance.randrange(len(right))
            said = right[:place] + chance.choice("0123456789") + right[place + 1 :]
        else:
            said = str(sum(operands) + chance.choice((-1, 1)) * 10 ** chance.randrange(1, 3))
        if said != right and len(said) == len(right) and said[0] != "0":
            return said


def wrong_end(chance: random.Random, operands: Sequence[int]) -> str:
    """A right thought and an answer that is not its own."""
    return f"{THINK}{chr(10).join(columns(operands))}{CLOSE}{wrong_short(chance, operands)}"


def wrong_long(chance: random.Random, operands: Sequence[int]) -> str:
    """A thought with one mistake, or an answer that is not its thought's."""
    if chance.random() < 0.3:
        return wrong_end(chance, operands)
    place = chance.randrange(3)
    lines, answer = walk(chance, operands, [place == each for each in range(3)])
    return f"{THINK}{chr(10).join(lines)}{CLOSE}{answer}"


def as_pair(operands: Sequence[int], right: str, wrong: str) -> dict[str, Any]:
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (right, wrong))
    return {"prompt": prompt(operands)["prompt"], "chosen": chosen, "rejected": rejected}


def pair(chance: random.Random, operands: Sequence[int]) -> dict[str, Any]:
    """A right answer and a wrong one. Either may be the longer, equally often, so length says nothing."""
    right_long, wrong_is_long = chance.choice(
        ((True, True),) * 4 + ((False, False), (True, False), (False, True), (True, False), (False, True))
    )
    right = long_answer(operands) if right_long else str(sum(operands))
    return as_pair(operands, right, (wrong_long if wrong_is_long else wrong_short)(chance, operands))


def balanced_pairs(chance: random.Random, operands: Iterable[Operands]) -> list[dict[str, Any]]:
    """Pairs, of which as many have the longer answer chosen as rejected; those in excess are drawn again."""
    pairs, lead = [], 0
    for triple in operands:
        while True:
            drawn = pair(chance, triple)
            longer = len(drawn["chosen"][0]["content"]) - len(drawn["rejected"][0]["content"])
            sign = (longer > 0) - (longer < 0)
            if sign * lead <= 0:  # else it would add to the excess
                break
        pairs.append(drawn)
        lead += sign
    return pairs


# ---- exercises: a pair says one bit of a thought of fifty tokens, a verdict one of ten (docs/log.md) ----


def judged_column(chance: random.Random) -> str:
    terms = [chance.randint(0, 2), *(chance.randint(0, 9) for _ in range(3))]
    right = chance.random() < 0.5
    return column(terms, sum(terms) if right else off(chance, sum(terms))) + VERDICTS[right]


def judged_thought(chance: random.Random, operands: Sequence[int]) -> str:
    """A sum with its thought. Each line may have a mistake, and half of them say whether they have."""
    wrong = [chance.random() < 0.4 for _ in range(3)]
    lines, answer = walk(chance, operands, wrong)
    said = [line + (VERDICTS[not bad] if chance.random() < 0.5 else "") for line, bad in zip(lines, wrong, strict=True)]
    return f"{problem(operands)}{THINK}{chr(10).join(said)}{CLOSE}{answer}"


def exercises(chance: random.Random, count: int, thoughts: float) -> Iterator[str]:
    """Documents of columns, a share of them of thoughts, each with verdicts."""
    for _ in range(count):
        if chance.random() < thoughts:
            yield "\n".join(judged_thought(chance, triple) for triple in draw(chance, "train", 3)) + "\n"
        else:
            yield "\n".join(judged_column(chance) for _ in range(10)) + "\n"


# ---- all of it ----


def make_pairs(out: Path, seed: int, count: int, held_out: int) -> None:
    """Write into `out` the texts columns.jsonl and thoughts.jsonl, and pairs: pairs.jsonl, of which half differ in the
    answer behind the thought alone, and pairs-test.jsonl, of all kinds."""

    def chance(name: str) -> random.Random:
        return random.Random(f"{seed} pairs {name}")

    for name, share in (("columns", 0.0), ("thoughts", 0.6)):
        texts = exercises(chance(name), count // 2, share)
        write_rows(out / f"{name}.jsonl", ({"text": text} for text in texts))
    styles = chance("train styles")
    ends = [as_pair(each, long_answer(each), wrong_end(styles, each)) for each in draw(styles, "train", count // 2)]
    pairs = ends + balanced_pairs(styles, draw(styles, "train", count // 2))
    write_rows(out / "pairs.jsonl", styles.sample(pairs, len(pairs)))
    write_rows(out / "pairs-test.jsonl", balanced_pairs(chance("test styles"), draw(chance("test"), "test", held_out)))
