"""Documents for pre-training and for both phases: text, and rows from which a network learns to look things up.

python data.py TEXTS OUT --window 512 --documents 4000 [--share 0.3]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from leanseek.evaluation.needle import NAMES, WORDS, new_code, statement

PER_TOKEN = 3.2  # bytes of a token, about


def repeats(rng: random.Random, size: int) -> str:
    """Random words, two to four times in a row: whoever looks back knows all but the first time."""
    out = ""
    while len(out) < size:
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(8, max(9, int(size / 12)))))
        out += (" " + words + ".") * rng.randrange(2, 5)
    return out[: size + size // 4]


def codes(rng: random.Random, size: int, sentences: list[str]) -> str:
    """Codes of names in text, and each asked for once or more at any distance."""
    out, known = "", dict[str, int]()
    names = rng.sample(NAMES, rng.choice((2, 4, 8, 16, 32)))
    dense = rng.random()
    while len(out) < size:
        kind = rng.random()
        if kind < dense:
            name = rng.choice(names)
            known.setdefault(name, new_code(rng))
            out += statement(name, known[name])
        else:
            out += " " + rng.choice(sentences)
    return out


def documents(texts: Path, window: int, count: int, share: float, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    whole = " ".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(texts.glob("*.txt")))
    size = int(window * PER_TOKEN)
    sentences = [" ".join(s.split()) + "." for s in whole.split(".") if 10 < len(s) < 200]
    for _ in range(count):
        kind = rng.random()
        if kind < share / 2:
            yield repeats(rng, rng.randrange(size // 2, size))
        elif kind < share:
            yield codes(rng, rng.randrange(size // 2, size), sentences)
        else:
            at = rng.randrange(len(whole) - size)
            yield " ".join(whole[at : at + size].split())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with a.out.open("w") as f:
        for text in documents(a.texts, a.window, a.documents, a.share, a.seed):
            f.write(json.dumps({"text": text}) + "\n")
