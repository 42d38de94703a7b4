"""Documents of every stage: text, and rows from which a network learns to look things up."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from leanseek.data.tokenizer import save_tokenizer, train_tokenizer
from leanseek.evaluation.needle import NAMES, PLAIN, statement

VOCABULARY = 1024


class Kind(NamedTuple):
    """What the documents of a stage are like."""

    window: int  # tokens of the windows they are for
    documents: int
    names: tuple[int, ...]  # how many codes a document has
    plain: bool  # between the codes stand the same few sentences, else some of the text
    between: int  # sentences between codes, at most
    made: float  # share that has codes; the rest is text
    first: int  # the smallest code, in four digits; from 0 on 00 to 09 are as frequent as other pairs (docs/log.md)


KINDS = {
    "lookup": Kind(128, 50_000, (1, 1, 2, 3, 4), True, 8, 1.0, 1000),
    "base": Kind(512, 16_000, (1, 1, 2, 4), False, 32, 0.5, 1000),
    "2k": Kind(2048, 1_200, (1, 1, 2, 4), False, 128, 0.5, 0),
    "8k": Kind(8192, 300, (1, 1, 2, 4), False, 512, 0.5, 0),
}


def codes(rng: random.Random, size: int, kind: Kind, sentences: Sequence[str]) -> str:
    """Codes of names, each said again. What stands between varies in length: else a network copies what stands so
    many tokens before, and no name is read (docs/log.md). `size` bytes or some more."""
    known = {name: f"{rng.randrange(kind.first, 10_000):04d}" for name in rng.sample(NAMES, rng.choice(kind.names))}
    most = int((kind.between + 1) ** rng.random())  # short and long ones alike
    names, out = list(known), ""
    while len(out) < size:
        name = rng.choice(names)
        out += statement(name, known[name])
        at, count = rng.randrange(len(sentences)), rng.randint(0, most)
        out += "".join(" " + sentences[(at + each) % len(sentences)] for each in range(count))
    return out


def corpus(texts: Path) -> str:
    """All .txt files of a folder."""
    return " ".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(texts.glob("*.txt")))


def documents(texts: Path, kind: Kind, seed: int) -> Iterator[str]:
    """Of about a window each."""
    rng = random.Random(seed)
    whole = corpus(texts)
    sentences = [" ".join(s.split()) + "." for s in whole.split(".") if 10 < len(s) < 200]
    for _ in range(kind.documents):
        drawn, size = rng.random(), int(3 * kind.window * rng.uniform(0.7, 1.2))
        if drawn < kind.made:
            yield codes(rng, size, kind, PLAIN if kind.plain else sentences)
        else:
            at = rng.randrange(len(whole) - size)
            yield " ".join(whole[at : at + size].split())


def write_tokenizer(folder: Path, rows: Sequence[Path]) -> None:
    """One of the texts in files of ours. Two digits are a token, so that a code is two, which always stand where they
    do behind its name."""

    def texts() -> Iterator[str]:
        for path in rows:
            with path.open(encoding="utf-8") as lines:
                yield from (json.loads(line)["text"] for line in lines)

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(texts(), VOCABULARY, digits=2), folder)
