"""What the networks of experiments/long-context read."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer

from leanseek.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentences = (
        f"The {n}th of {m} men said that it rained in the {n * m}th month." for n in range(40) for m in range(9)
    )
    folder = tmp_path_factory.mktemp("texts")
    (folder / "plain.txt").write_text(" ".join(sentences))
    return folder


@pytest.fixture(scope="module")
def tokenizer(long_context: dict[str, ModuleType], texts: Path) -> Tokenizer:
    long_context["data"].write_tokenizer(texts / "tokenizer", texts, 1_000)
    return load_tokenizer(texts / "tokenizer")


def test_a_window_begins_with_each_draft(
    long_context: dict[str, ModuleType], texts: Path, tokenizer: Tokenizer
) -> None:
    data = long_context["data"]
    kind = data.KINDS["base"]
    for text in itertools.islice(data.documents(texts, kind, 1, tokenizer), 3):
        ids = tokenizer.encode(text).ids
        assert len(ids) == 8 * kind.window - 1  # and a token that ends it
        windows = [tokenizer.decode(ids[at : at + kind.window]) for at in range(0, len(ids), kind.window)]
        for window in windows:  # a name has one code in it
            codes = set(re.findall(r"The code of (\w+) is (\d{4})\.", window))
            assert len({name for name, _ in codes}) == len(codes)


def test_two_digits_and_a_name_are_a_token_each(long_context: dict[str, ModuleType], tokenizer: Tokenizer) -> None:
    assert all(len(tokenizer.encode(f"{pair:02d}").ids) == 1 for pair in range(100))
    assert all(len(tokenizer.encode(" " + name).ids) == 1 for name in long_context["data"].NAMES)


def test_names_are_said_again(long_context: dict[str, ModuleType], texts: Path) -> None:
    data = long_context["data"]
    for draft in itertools.islice(data.drafts(texts, data.KINDS["names"], 0), 20):
        said = re.findall(r" (\w+) (?:is )?(\w+)\.", draft)
        names = [name for name, value in said if name in data.NAMES and value in data.NAMES]
        assert 4 <= len(set(names)) <= 8 and len(names) > 2 * len(set(names))
