"""The demonstration's data: right, deterministic, and honest about what is held out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from leanseek import Transformer, load, save
from leanseek.engine import Tokenizer
from leanseek.posttraining import graders
from leanseek.server.templates import load_chat_template

SIZES = {"traces": 300, "text": 20_000, "sft": 200, "rl": 60, "distil": 40, "test": 50, "dev": 50}
PAIRS = (200, 50)
FILES = ("pretrain", "student", "sft", "sft-short", "rl", "distil", "dev", "test", "sft-dev")
JUDGED = ("pairs", "pairs-test", "columns", "thoughts")


@pytest.fixture(scope="module")
def data(reason: dict[str, ModuleType]) -> ModuleType:
    return reason["data"]


@pytest.fixture(scope="module")
def pairs(reason: dict[str, ModuleType]) -> ModuleType:
    return reason["pairs"]


@pytest.fixture(scope="module")
def made(data: ModuleType, pairs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reason")
    (folder / "corpus").mkdir()
    words = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n\n"
    (folder / "corpus" / "hamlet.txt").write_text(words * 300)
    data.make(folder / "corpus", folder / "out", 0, SIZES)
    pairs.make_pairs(folder / "out", 0, *PAIRS)
    return folder / "out"


def rows(made: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made / f"{name}.jsonl").read_text().splitlines()]


def triples(text: str) -> set[tuple[int, ...]]:
    """Triples of three digits each that are summed in a text, in any order of theirs."""
    found = re.findall(r"(?<![\d+])(\d{3})\+(\d{3})\+(\d{3})(?![\d+])", text)
    return {tuple(sorted(map(int, each))) for each in found}


def test_the_same_seed_gives_the_same_files_and_another_does_not(
    data: ModuleType, pairs: ModuleType, made: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate(("same", "other")):
        data.make(made.parent / "corpus", tmp_path / name, seed, SIZES)
        pairs.make_pairs(tmp_path / name, seed, *PAIRS)
    for name in [*(f"{name}.jsonl" for name in FILES + JUDGED), "tokenizer/tokenizer.json"]:
        assert (tmp_path / "same" / name).read_bytes() == (made / name).read_bytes()
    for name in FILES + JUDGED:
        assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != (made / f"{name}.jsonl").read_bytes()


def test_held_out_operands_occur_nowhere_else(data: ModuleType, made: Path) -> None:
    held = {name: triples((made / f"{name}.jsonl").read_text()) for name in ("test", "dev")}
    assert len(held["test"]) == len(held["dev"]) == 50 and not held["test"] & held["dev"]
    for name in ("pretrain", "sft", "sft-short", "rl", "distil", "pairs", "thoughts"):
        seen = triples((made / f"{name}.jsonl").read_text())
        assert seen and {data.split_of(each) for each in seen} == {"train"}
    assert {data.split_of(each) for each in triples((made / "pairs-test.jsonl").read_text())} == {"test"}
    assert triples((made / "sft-dev.jsonl").read_text()) == held["dev"]


def test_the_student_reads_the_same_exercises_without_thoughts(data: ModuleType, made: Path) -> None:
    teacher, student = ((made / f"{name}.jsonl").read_text() for name in ("pretrain", "student"))
    assert data.THINK in teacher and data.THINK not in student and "What is" not in student
    assert all(exercise in student for exercise in ("copy ", "reverse ", "="))


def test_the_order_of_the_operands_does_not_change_the_split(data: ModuleType) -> None:
    chance = random.Random(0)
    for _ in range(50):
        operands = [chance.randint(100, 999) for _ in range(3)]
        assert len({data.split_of(each) for each in permutations(operands)}) == 1


def test_chats_are_right_and_a_quarter_of_them_thinks(data: ModuleType, made: Path) -> None:
    chats = rows(made, "sft")
    long = 0
    for row in chats:
        user, assistant = row["messages"]
        truth = sum(map(int, re.findall(r"\d+", user["content"])))
        assert graders.answer([assistant["content"]], answer=[truth]) == [1.0]
        if assistant["content"].startswith("<think>"):
            long += 1
            assert graders.format([assistant["content"]]) == [1.0]
            for line in assistant["content"].partition("</think>")[0].removeprefix("<think>").split("\n"):
                terms, _, total = line.partition("=")
                assert sum(map(int, terms.split())) == int(total)
    assert 0.15 < long / len(chats) < 0.35
    assert not any("<think>" in row["messages"][1]["content"] for row in rows(made, "sft-short"))


def test_a_thought_adds_columns_from_the_last_digit_with_carries(data: ModuleType) -> None:
    assert data.long_answer((957, 486, 309)) == "<think>0 7 6 9=22\n2 5 8 0=15\n1 9 4 3=17</think>1752"
    assert data.long_answer((111, 222, 333)) == "<think>0 1 2 3=06\n0 1 2 3=06\n0 1 2 3=06</think>666"


def test_prompts_carry_their_answer(made: Path) -> None:
    for name in ("rl", "distil", "dev", "test"):
        for row in rows(made, name):
            assert int(row["answer"]) == sum(map(int, re.findall(r"\d+", row["prompt"][0]["content"])))


@pytest.mark.parametrize("name", ["pairs", "pairs-test"])
def test_pairs_have_a_right_and_a_wrong_answer_and_length_says_nothing(made: Path, name: str) -> None:
    longer = shorter = 0
    for row in rows(made, name):
        truth = [sum(map(int, re.findall(r"\d+", row["prompt"][0]["content"])))]
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert graders.answer([chosen], answer=truth) == [1.0] and graders.answer([rejected], answer=truth) == [0.0]
        longer += len(chosen) > len(rejected)
        shorter += len(chosen) < len(rejected)
    assert abs(longer - shorter) <= 1 and longer > 5


def _lines(text: str) -> list[tuple[list[int], int, str]]:
    """Digits, total and verdict of each column."""
    found = re.findall(r"(\d(?: \d)+)=(\d+)( yes| no)?", text)
    return [([int(digit) for digit in digits.split()], int(total), verdict) for digits, total, verdict in found]


def test_a_verdict_on_a_column_says_whether_it_adds_up(made: Path) -> None:
    lines = [line for row in rows(made, "columns") for line in _lines(row["text"])]
    assert all(verdict == (" yes" if sum(digits) == total else " no") for digits, total, verdict in lines)
    assert 0.4 < sum(verdict == " no" for *_, verdict in lines) / len(lines) < 0.6


def test_a_verdict_in_a_thought_minds_the_carry_and_the_answer_is_that_of_the_columns(made: Path) -> None:
    said = {"": 0, " yes": 0, " no": 0}
    for row in rows(made, "thoughts"):
        for thought, answer in re.findall(r"<think>(.*?)</think>(\d+)", row["text"], re.DOTALL):
            carry, digits = 0, ""
            for terms, total, verdict in _lines(thought):
                assert not verdict or verdict == (" yes" if [terms[0], sum(terms)] == [carry, total] else " no")
                said[verdict] += 1
                carry, digits = total // 10, str(total % 10) + digits
            assert int(answer) == int(f"{carry}{digits}")
    assert min(said.values()) > 0.15 * sum(said.values())


def test_a_deeper_model_begins_as_the_one_it_is_made_of(
    reason: dict[str, ModuleType],
    tiny_model: Callable[..., Transformer],
    tiny_tokens: torch.Tensor,
    made: Path,
    tmp_path: Path,
) -> None:
    model = tiny_model(num_nextn_predict_layers=0)
    save(model, tmp_path / "small", tokenizer_from=made / "tokenizer")
    reason["run"].deeper(tmp_path / "small", tmp_path / "deeper", 2)
    grown = load(tmp_path / "deeper")
    assert grown.config.num_hidden_layers == model.config.num_hidden_layers + 2
    with torch.no_grad():
        assert torch.equal(grown(tiny_tokens), model(tiny_tokens))


def test_the_tokenizer_has_single_digits_and_the_chat_format(data: ModuleType, made: Path) -> None:
    tokenizer = Tokenizer(made / "tokenizer")
    assert tokenizer.inner.get_vocab_size() <= data.VOCABULARY
    assert len(tokenizer.encode("1234567890")) == 10
    template = load_chat_template(made / "tokenizer")
    row = rows(made, "sft")[0]
    text = template.render(row["messages"][:1])
    assert text == f"<｜begin▁of▁sentence｜><｜User｜>{row['messages'][0]['content']}<｜Assistant｜>"
    said = {"role": "assistant", "content": data.long_answer((957, 486, 309))}
    whole = template.render([row["messages"][0], said], add_generation_prompt=False)
    assert whole == f"{text}{said['content']}<｜end▁of▁sentence｜>"
    again = template.render([row["messages"][0], said, row["messages"][0]])
    assert "<think>" not in again and "1752<｜end▁of▁sentence｜>" in again
    ids = tokenizer.encode(said["content"])
    assert tokenizer.decode(ids) == said["content"] and len(ids) + 1 <= 64
    template.close()
