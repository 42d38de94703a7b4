"""Preference pairs for the reward model of `make reason`: a right answer to a sum and a wrong one."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data import CLOSE, THINK, Operands, column, columns, draw, long_answer, prompt, split_of, write_rows


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


def wrong_long(chance: random.Random, operands: Sequence[int]) -> str:
    """A thought with one mistake, carried on to the answer, or an answer that is not its thought's."""
    lines = columns(operands)
    if chance.random() < 0.3:
        return f"{THINK}{chr(10).join(lines)}{CLOSE}{wrong_short(chance, operands)}"
    while True:
        carry, said, digits, wrong = 0, [], "", chance.randrange(len(lines))
        for place in range(len(lines)):
            terms = [n // 10**place % 10 for n in operands]
            if place == wrong and carry and chance.random() < 0.3:  # the carry forgotten
                total = sum(terms)
                terms = [0, *terms]
            else:
                terms = [carry, *terms]
                total = max(0, sum(terms) + (chance.choice((-2, -1, 1, 2)) if place == wrong else 0))
            said.append(column(terms, total))
            digits, carry = str(total % 10) + digits, total // 10
        answer = str(int(f"{carry}{digits}"))
        if answer != str(sum(operands)):
            return f"{THINK}{chr(10).join(said)}{CLOSE}{answer}"


def pair(chance: random.Random, operands: Sequence[int]) -> dict[str, Any]:
    """A right answer and a wrong one. Either may be the longer, equally often, so length says nothing."""
    right_long, wrong_is_long = chance.choice(
        ((True, True),) * 4 + ((False, False), (True, False), (False, True), (True, False), (False, True))
    )
    right = long_answer(operands) if right_long else str(sum(operands))
    wrong = (wrong_long if wrong_is_long else wrong_short)(chance, operands)
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (right, wrong))
    return {"prompt": prompt(operands)["prompt"], "chosen": chosen, "rejected": rejected}


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


def graded(chance: random.Random, operands: Sequence[Operands]) -> list[Operands]:
    """Half of the problems cut to their last digits, a quarter to their last two. Those of test are left out.

    One bit a pair says little about a thought of fifty tokens; short ones are learned first.
    """
    ends = [10 ** chance.choice((1, 1, 2, 3)) for _ in operands]
    cut = [tuple(n % end for n in triple) for triple, end in zip(operands, ends, strict=True)]
    return [triple for triple in cut if split_of(triple) == "train"]


def make_pairs(out: Path, seed: int, count: int, held_out: int) -> None:
    """Write pairs.jsonl and pairs-test.jsonl into `out`."""

    def chance(name: str) -> random.Random:
        return random.Random(f"{seed} pairs {name}")

    train = graded(chance("graded"), list(draw(chance("train"), "train", count)))
    write_rows(out / "pairs.jsonl", balanced_pairs(chance("styles"), train))
    test = draw(chance("test"), "test", held_out)
    write_rows(out / "pairs-test.jsonl", balanced_pairs(chance("test styles"), test))
