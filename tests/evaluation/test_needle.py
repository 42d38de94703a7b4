"""Needle maps say where a reader finds what is hidden: readers whose faults are known score what they should."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from leanseek.cli import app
from leanseek.engine import Tokenizer
from leanseek.errors import InputError
from leanseek.evaluation import needle
from leanseek.evaluation.scoring import Scorer


class Reader:
    """A scorer that answers by `read` of the prompt's text."""

    def __init__(self, tokenizer: Tokenizer, read: Callable[[str], str], window: int = 2048):
        self.tokenizer, self.read, self.max_length = tokenizer, read, window - 1
        self.prompts: list[list[int]] = []

    def continued(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        self.prompts += prompts
        return [self.read(self.tokenizer.decode(prompt)) for prompt in prompts]


def by_name(text: str) -> str:
    name = re.findall(r"The code of (\w+) is$", text)[0]
    return " " + (re.findall(rf"The code of {name} is (\d+)\.", text) or ["none"])[0] + ". And so on"


def any_code(text: str) -> str:
    return " " + (re.findall(r"is (\d+)\.", text) or ["none"])[0]


def repeated(text: str) -> str:
    first, again = text.split(".")
    return " " + " ".join(first.split()[len(again.split()) :])


@pytest.fixture
def find(scorer: Scorer) -> Callable[..., tuple[list[needle.Cell], list[list[int]]]]:
    """find(read, task, **options): the map that a reader gets, and the prompts."""

    def run(read: Callable[[str], str], task: str, **options: Any) -> tuple[list[needle.Cell], list[list[int]]]:
        reader = Reader(scorer.tokenizer, read)
        return needle.find(reader, task, **options), reader.prompts  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize(
    ("read", "task"), [(by_name, "needle"), (any_code, "needle"), (by_name, "needle_multikey"), (repeated, "copy")]
)
def test_who_reads_all_finds_all(find: Any, read: Callable[[str], str], task: str) -> None:
    cells, _ = find(read, task)
    assert [cell.length for cell in cells[:: needle.DEPTHS]] == [512, 1024, 2048]
    assert all(cell.accuracy == 1.0 for cell in cells)
    found = needle.figures(cells, needle.NEEDLES)
    assert (found["accuracy"], found["green"], found["samples"]) == (1.0, 1.0, 240)


def test_who_sees_the_last_half_finds_the_deep_half(find: Any) -> None:
    cells, _ = find(lambda text: by_name(text[-500:]), "needle", lengths=[1024])
    assert [cell.accuracy for cell in cells] == [0.0] * 5 + [1.0] * 5


def test_who_takes_any_code_fails_where_there_are_several(find: Any) -> None:
    cells, _ = find(any_code, "needle_multikey", lengths=[1024])
    assert needle.figures(cells, 8)["accuracy"] < 0.7


@pytest.mark.parametrize(("said", "right"), [(" 4821", True), ("4821. And", True), (" 48210", False), (" 482", False)])
def test_an_answer_is_compared_exactly(said: str, right: bool) -> None:
    assert needle._says(said, "4821") is right


def test_prompts_fill_their_length_and_hold_the_needle_at_its_depth(scorer: Scorer, find: Any) -> None:
    _, prompts = find(by_name, "needle", lengths=[1024], count=2)
    longest = max(len(scorer.tokenizer.encode(" " + sentence)) for sentence in needle.PLAIN)
    for number, prompt in enumerate(prompts):
        assert 1024 - 7 - 2 * longest < len(prompt) <= 1024 - len(" 4821.")
        text = scorer.tokenizer.decode(prompt)
        place = text.index("The code of") / (len(text) - 60)
        assert place == pytest.approx(number % needle.DEPTHS / (needle.DEPTHS - 1), abs=0.04)


def test_a_prompt_beside_a_longer_answer_is_answered_in_what_its_window_has_left(scorer: Scorer) -> None:
    """Codes differ in tokens, so a prompt with a short one leaves too little room for the longest."""
    room = len(scorer.continued([[5] * (scorer.max_length - 1)], 2)[0])
    full, short = scorer.continued([[5] * (scorer.max_length - 1), [5] * 8], 5)
    assert len(full) == room and short == scorer.continued([[5] * 8], 5)[0]


def test_prompts_are_the_same_every_time_and_share_what_stands_before_the_needle(find: Any) -> None:
    _, first = find(by_name, "needle", lengths=[1024], count=1)
    _, again = find(by_name, "needle", lengths=[1024], count=1)
    assert first == again
    deep, deeper = first[7:9]
    shared = next(i for i, (a, b) in enumerate(zip(deep, deeper, strict=False)) if a != b)
    assert shared > 0.7 * len(deep)


def test_a_text_of_ones_own_hides_the_needles(scorer: Scorer, find: Any) -> None:
    _, prompts = find(by_name, "needle", lengths=[512], text="Call me Ishmael. Some years ago. Never mind how long.")
    assert "Call me Ishmael." in scorer.tokenizer.decode(prompts[0])


@pytest.mark.parametrize(
    ("task", "lengths", "message"),
    [
        ("needle", [4096], "4096 tokens is beyond the model's window of 2048"),
        ("needle_multikey", [80], "more than the 80 of a haystack"),
        ("copy", [30], "30 tokens are too few to copy from"),
    ],
)
def test_lengths_without_room_are_refused(find: Any, task: str, lengths: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find(by_name, task, lengths=lengths)


# ---- the command ----


def test_the_command_prints_and_draws_the_maps(folder: Path, tmp_path: Path, small_cache: None) -> None:
    picture = tmp_path / "map.svg"
    command = ["eval", str(folder), "--tasks", "needle,copy", "--limit", "1", "--lengths", "128,200"]
    done = CliRunner().invoke(app, [*command, "--picture", str(picture), "--json"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert results["needle"].keys() == {"accuracy", "green", "samples", "map"}
    assert [cell["length"] for cell in results["copy"]["map"]] == [128] * 10 + [200] * 10
    assert picture.read_text().startswith("<?xml")
    shown = CliRunner().invoke(app, command)
    assert shown.output.count("%") == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "human_eval", "--lengths", "512"], "--lengths is for needle"),
        (["--tasks", "needle", "--lengths", "512,many"], "many is not a number of tokens"),
        (["--tasks", "needle", "--picture", "map.gif"], "must end in .png or .svg"),
        (["--tasks", "needle", "--picture", "no/map.png"], "there is no folder no"),
        (["--tasks", "needle", "--haystack", "no.txt"], "no.txt"),
    ],
)
def test_the_command_refuses_before_it_loads_a_model(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        app(["eval", "nowhere", *arguments], standalone_mode=False)
