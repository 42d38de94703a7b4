"""Documents of every stage: text, and rows from which a network learns to look things up."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from leanseek.evaluation.needle import NAMES, WORDS, new_code, statement

BYTES = 3.2  # of a token, about


def repeats(rng: random.Random, size: int) -> str:
    """Random words, two to four times: who looks back knows all but the first time. `size` bytes or some more."""
    out = ""
    while len(out) < size:
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(5, max(6, size // 16))))
        out += (" " + words + ".") * rng.randrange(2, 5)
    return out


def lists(rng: random.Random, size: int) -> str:
    """One list of few different words, over and over: the first thing that a network looks up (docs/log.md)."""
    words = " ".join(rng.choice(WORDS[:64]) for _ in range(rng.randrange(4, 32)))
    return (" " + words) * (1 + 4 * size // len(words))


def codes(rng: random.Random, size: int, sentences: list[str]) -> str:
    """Codes of names between sentences, each said again at any distance. `size` bytes or some more."""
    names = rng.sample(NAMES, rng.choice([n for n in (1, 2, 4, 8, 16, 32) if n <= max(1, size // 80)]))
    known = {name: new_code(rng) for name in names}
    density, out = rng.random(), ""
    while len(out) < size:
        name = rng.choice(names)
        out += statement(name, known[name]) if rng.random() < density else " " + rng.choice(sentences)
    return out


def documents(texts: Path, window: int, count: int, share: float, seed: int) -> Iterator[str]:
    """`count` documents of half a window to a whole one; `share` of them made, the others pieces of the texts.
    Where all are made, they are lists of several windows."""
    rng = random.Random(seed)
    whole = " ".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(texts.glob("*.txt")))
    sentences = [" ".join(s.split()) + "." for s in whole.split(".") if 10 < len(s) < 200]
    for _ in range(count):
        kind, size = rng.random(), int(window * BYTES * rng.uniform(0.5, 1.0))
        if share == 1:
            yield lists(rng, size)
        elif kind < share / 2:
            yield repeats(rng, size)
        elif kind < share:
            yield codes(rng, size, sentences)
        else:
            at = rng.randrange(len(whole) - size)
            yield " ".join(whole[at : at + size].split())


def write(out: Path, texts: Path, window: int, count: int, share: float, seed: int) -> None:
    """The documents as JSON lines."""
    with out.open("w", encoding="utf-8") as file:
        for text in documents(texts, window, count, share, seed):
            file.write(json.dumps({"text": text}) + "\n")
