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
    between: int  # sentences until a name is said again, about, at most
    plain: bool  # these are the same few ones, else some of the text
    made: float  # share of the documents that is made; the rest is text


CODE = statement("{name}", "{code}")
NEAR, FAR = " {name} {other}.", " {name} is {other}."  # a name right before its value, and not
KINDS = {  # names are compared where they are near first, values become codes then: docs/log.md
    "names": Kind(128, 3_300, (4, 6, 8), (NEAR, FAR), 1, True, 1.0),
    "lookup": Kind(128, 3_300, (4, 6, 8), (NEAR, FAR, " {name} {code}.", " {name} is {code}.", CODE), 1, True, 1.0),
    "base": Kind(512, 2_150, (1, 2, 4, 8), (CODE,), 32, False, 0.5),
    "2k": Kind(2048, 88, (1, 2, 8, 32), (CODE,), 128, False, 0.5),
    "8k": Kind(8192, 64, (1, 4, 16, 64), (CODE,), 512, False, 0.5),
}


def look_up(rng: random.Random, size: int, kind: Kind, sentences: Sequence[str]) -> str:
    """Names and what belongs to them, each said again. What stands between varies in length: else a network copies
    what stands so many tokens before, and no name is read (docs/log.md). Once there is a long stretch of text, behind
    which every name is far away. `size` bytes or some more."""
    form = rng.choice(kind.forms)
    names = rng.sample(NAMES, rng.choice(kind.names))
    said = [form.format(name=name, code=f"{rng.randrange(10_000):04d}", other=rng.choice(NAMES)) for name in names]
    most = int((max(1, kind.between // len(names)) + 1) ** rng.random())  # short and long ones alike
    window = int(2.3 * kind.window)  # bytes of text, about
    begin, end = (0, 0) if kind.plain else sorted(rng.randrange(window) for _ in range(2))
    out = ""
    while len(out) < size:
        out += rng.choice(said)
        at, count = rng.randrange(len(sentences)), rng.randint(0, most)
        while count > 0 or begin < len(out) < end:
            out += " " + sentences[at % len(sentences)]
            at, count = at + 1, count - 1
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
            yield " " + " ".join(whole[at : at + size].split())


def documents(texts: Path, kind: Kind, seed: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Eight drafts, each cut to a window, so that every window has one: look-up is learned from these in fewer steps
    (docs/log.md). One alone would always end where its window does, and be taken to end wherever a window might."""
    windows: list[str] = []
    for draft in drafts(texts, kind, seed):
        size = kind.window - (len(windows) == 7)  # the last has the token that ends a document
        text = tokenizer.decode(tokenizer.encode(draft).ids[:size])
        if len(tokenizer.encode(text).ids) == size and text[-1] != " ":  # a few change by the cut, or by what follows
            windows.append(text)
        if len(windows) == 8:
            yield "".join(windows)
            windows = []


def write_tokenizer(folder: Path, texts: Path, count: int = 8_000) -> None:
    """One of `count` drafts of lookup and of base each. Two digits are a token, so that a code is two, which always
    stand where they do behind its name."""
    each = (itertools.islice(drafts(texts, KINDS[kind], 0), count) for kind in ("lookup", "base"))
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(itertools.chain(*each), VOCABULARY, digits=2), folder)
