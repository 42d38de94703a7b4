"""Documents of every stage: text, and rows from which a network learns to look things up."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from leanseek.data.tokenizer import save_tokenizer, train_tokenizer
from leanseek.evaluation.needle import NAMES, WORDS, new_code, statement

VOCABULARY = 1024


class Kind(NamedTuple):
    """What the documents of a stage are like."""

    window: int  # tokens of the windows they are for
    documents: int
    names: tuple[int, ...]  # how many codes a document has
    sentences: bool  # between the codes, else words
    between: int  # of them at most
    made: float  # share that is made, a third of it lists; the rest is text


KINDS = {
    "lookup": Kind(128, 40_000, (1, 1, 2, 3), False, 12, 1.0),
    "base": Kind(512, 16_000, (1, 1, 2, 4, 8), True, 16, 0.5),
    "2k": Kind(2048, 1_200, (1, 1, 2, 4, 8), True, 64, 0.5),
    "8k": Kind(8192, 300, (1, 1, 2, 4, 8), True, 256, 0.5),
}


def lists(rng: random.Random, size: int) -> str:
    """One list of words over and over, `size` bytes or some more."""
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(4, max(12, size // 40))))
    return f" {words}." * (1 + size // len(words))


def codes(rng: random.Random, size: int, kind: Kind, fillers: Sequence[str]) -> str:
    """Codes of names, each said again. What stands between varies in length: else a network copies what stands so
    many tokens before, and no name is read (docs/log.md). `size` bytes or some more."""
    known = {name: new_code(rng) for name in rng.sample(NAMES, rng.choice(kind.names))}
    names, most, out = list(known), rng.randint(1, kind.between), ""
    while len(out) < size:
        name = rng.choice(names)
        out += statement(name, known[name])
        out += "".join(" " + rng.choice(fillers) for _ in range(rng.randint(0, most)))
    return out


def documents(texts: Path, kind: Kind, seed: int) -> Iterator[str]:
    """Of about a window each."""
    rng = random.Random(seed)
    whole = " ".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(texts.glob("*.txt")))
    sentences = [" ".join(s.split()) + "." for s in whole.split(".") if 10 < len(s) < 200]
    for _ in range(kind.documents):
        drawn, size = rng.random(), int(3 * kind.window * rng.uniform(0.7, 1.2))
        if drawn < kind.made * 2 / 3:
            yield codes(rng, size, kind, sentences if kind.sentences else WORDS)
        elif drawn < kind.made:
            yield lists(rng, size)
        else:
            at = rng.randrange(len(whole) - size)
            yield " ".join(whole[at : at + size].split())


def write(out: Path, texts: Path, kind: Kind, seed: int) -> None:
    """The documents as JSON lines."""
    with out.open("w", encoding="utf-8") as file:
        for text in documents(texts, kind, seed):
            file.write(json.dumps({"text": text}) + "\n")


def write_tokenizer(folder: Path, rows: Path) -> None:
    """One of the texts in a file of ours. Each digit is a token, so that a code's stand where they always do behind
    its name."""
    folder.mkdir(parents=True, exist_ok=True)
    with rows.open(encoding="utf-8") as lines:
        save_tokenizer(train_tokenizer((json.loads(line)["text"] for line in lines), VOCABULARY, digits=1), folder)
