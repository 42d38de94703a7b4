"""Documents of every stage: text, and rows from which a network learns to look things up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from leanseek.data.tokenizer import save_tokenizer, train_tokenizer
from leanseek.evaluation.needle import NAMES, PLAIN, statement

VOCABULARY = 1024


class Kind(NamedTuple):
    """What the documents of a stage are like."""

    window: int  # tokens of the windows they are for
    documents: int
    names: tuple[int, ...]  # how many a document has
    forms: tuple[str, ...]  # what it says of each of them, over and over; one form a document
    between: int  # sentences between two of those, at most
    plain: bool  # these are the same few ones, else some of the text
    made: float  # share of the documents that is made; the rest is text


CODE = statement("{name}", "{code}")
NEAR, FAR = " {name} {other}.", " {name} is {other}."  # a name right before its value, and not
KINDS = {  # names are compared where they are near first, values become codes then: docs/log.md
    "names": Kind(128, 21_500, (2, 3, 4), (NEAR, FAR), 1, True, 1.0),
    "lookup": Kind(128, 26_000, (1, 2, 3, 4), (NEAR, FAR, " {name} {code}.", " {name} is {code}.", CODE), 4, True, 1.0),
    "base": Kind(512, 17_000, (1, 2, 4, 8), (CODE,), 32, False, 0.5),
    "2k": Kind(2048, 700, (1, 2, 4, 8, 16, 32), (CODE,), 128, False, 0.5),
    "8k": Kind(8192, 270, (1, 2, 4, 8, 16, 32, 64), (CODE,), 512, False, 0.5),
}


def look_up(rng: random.Random, size: int, kind: Kind, sentences: Sequence[str]) -> str:
    """Names and what belongs to them, each said again. What stands between varies in length: else a network copies
    what stands so many tokens before, and no name is read (docs/log.md). `size` bytes or some more."""
    form = rng.choice(kind.forms)
    names = rng.sample(NAMES, rng.choice(kind.names))
    said = [form.format(name=name, code=f"{rng.randrange(10_000):04d}", other=rng.choice(NAMES)) for name in names]
    most = min(kind.between, int((kind.between + 1) ** rng.random()))  # short and long ones alike
    out = ""
    while len(out) < size:
        out += rng.choice(said)
        at, count = rng.randrange(len(sentences)), rng.randint(0, most)
        out += "".join(" " + sentences[(at + each) % len(sentences)] for each in range(count))
    return out


def corpus(texts: Path) -> str:
    """All .txt files of a folder."""
    return " ".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(texts.glob("*.txt")))


def drafts(texts: Path, kind: Kind, seed: int) -> Iterator[str]:
    """Endless, of more than a window each."""
    rng = random.Random(seed)
    whole = corpus(texts)
    sentences = [" ".join(s.split()) + "." for s in whole.split(".") if 10 < len(s) < 200]
    size = 6 * kind.window
    while True:
        if rng.random() < kind.made:
            yield look_up(rng, size, kind, PLAIN if kind.plain else sentences)
        else:
            at = rng.randrange(len(whole) - size)
            yield " ".join(whole[at : at + size].split())


def documents(texts: Path, kind: Kind, seed: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Of a window each, the token that ends them included, so that every window is one document: look-up is learned
    from these in half the steps (docs/log.md). The few whose tokens change by the cut are left out."""
    found, size = 0, kind.window - 1
    for draft in drafts(texts, kind, seed):
        text = tokenizer.decode(tokenizer.encode(draft).ids[:size])
        if len(tokenizer.encode(text).ids) == size:
            yield text
            found += 1
            if found == kind.documents:
                return


def write_tokenizer(folder: Path, texts: Path) -> None:
    """One of what the first stages read. Two digits are a token, so that a code is two, which always stand where they
    do behind its name."""
    each = (itertools.islice(drafts(texts, KINDS[kind], 0), 8_000) for kind in ("lookup", "base"))
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(itertools.chain(*each), VOCABULARY, digits=2), folder)
