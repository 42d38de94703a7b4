"""Needles in haystacks, at every length and depth: a code to find (alone, or of several as in RULER), and copying.

Prompts are completions, so that base models can be asked: the last sentence repeats the needle up to its code.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from leanseek.engine import Tokenizer
from leanseek.errors import InputError
from leanseek.evaluation.scoring import Scorer

if TYPE_CHECKING:
    from leanseek.plotting import Axes

SHORTEST = 512  # tokens; longer haystacks double up to the model's window
DEPTHS = 10
NEEDLES = 8  # of a cell
KEYS = 4  # codes in a haystack of several, as RULER's niah_multikey_1
GREEN = 0.95  # share of a cell that counts as found

# one token each in many vocabularies
NAMES = (
    "Adam Alan Alice Anna Arthur Ben Bill Carl Clara Daniel David Diana Edgar Ella Emma Eric Felix Frank Fred George "
    "Grace Hanna Harry Helen Henry Irene Jack James Jane John Julia Karl Kate Laura Leo Lewis Lily Lucy Maria Mark "
    "Martin Mary Max Nina Nora Oliver Oscar Otto Paul Peter Philip Ralph Robert Rosa Ruth Sarah Simon Sophie Thomas "
    "Tom Victor Vera Walter William"
).split()
WORDS = (
    "air apple arm back ball bank bell bird blood blue board boat book box boy bread brick bridge bush cake camp car "
    "case cat chair child church city clay cloud coat corn cup day deer desk dog door dust ear earth egg eye face "
    "farm field fire fish flag flower food foot fork friend frog game garden gate gift girl glass goat gold grass "
    "green hair hand hat head heart hill home horse house ice iron island jar key king knee lake lamp land leaf leg "
    "letter light lion list lock man map mark meat milk mill moon mouse mouth name neck nest night nose oak ocean "
    "page paper park path pen pig pin plant plate pot queen rain red ring river road rock roof room rose sail salt "
    "sand sea seed ship shoe shop silk sister skin sky smoke snow soap son song soup star stone street sun table "
    "tail tea tent thread tooth town tree uncle valley voice wall watch water wheel white wind wine wing winter wolf "
    "woman wood wool word yard year"
).split()
PLAIN = (  # RULER's noise, for models of any language and training
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
    "The river runs down to the sea.", "A bird sings in the old tree.", "Rain falls on the roof of the house.",
)  # fmt: skip


def statement(name: str, code: int | str) -> str:
    return f" The code of {name} is {code}."


def question(name: str) -> str:
    """What a statement says before the code."""
    return f" The code of {name} is"


class Cell(NamedTuple):
    """A length and a depth of the map."""

    length: int  # tokens of the prompt and its answer
    depth: float  # place of the needle: 0 is the beginning
    accuracy: float  # share of the needles that were found


class _Ask(NamedTuple):
    prompt: list[int]
    answer: str


class Haystack:
    """Sentences between which needles are hidden: of a text, or plain ones."""

    def __init__(self, tokenizer: Tokenizer, text: str | None = None):
        sentences: Iterable[str] = PLAIN if text is None else (s + "." for s in text.split(".") if s.strip())
        self.tokenizer = tokenizer
        self.sentences = [self.encode(" " + " ".join(s.split())) for s in sentences]
        if not self.sentences:
            raise InputError("the haystack's text has no sentence")
        self.leading = tokenizer.encode("", add_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def room(self, size: int, rng: random.Random) -> list[list[int]]:
        """Sentences of `size` tokens or little less, from a random place on."""
        order = itertools.cycle(self.sentences)
        for _ in range(rng.randrange(len(self.sentences))):
            next(order)
        found: list[list[int]] = []
        misses = 0
        while misses < 8:
            sentence = next(order)
            if len(sentence) <= size:
                found.append(sentence)
                size -= len(sentence)
            else:
                misses += 1
        return found


def _needle(hay: Haystack, length: int, depth: float, rng: random.Random, keys: int) -> _Ask:
    """The asked code is at `depth`, others anywhere."""
    names = rng.sample(NAMES, keys)
    codes = rng.sample(range(1000, 10000), keys)
    needles = [hay.encode(statement(*pair)) for pair in zip(names, codes, strict=True)]
    asked, answer = hay.encode(question(names[0])), hay.encode(f" {codes[0]}.")
    taken = len(hay.leading) + sum(map(len, needles)) + len(asked) + len(answer)
    if taken > length:
        raise InputError(f"{keys} codes and a question take {taken} tokens, more than the {length} of a haystack")
    sentences = hay.room(length - taken, rng)
    for other in needles[1:]:
        sentences.insert(rng.randrange(len(sentences) + 1), other)
    before = depth * sum(map(len, sentences))
    place, passed = 0, 0
    while place < len(sentences) and passed + len(sentences[place]) / 2 <= before:
        passed += len(sentences[place])
        place += 1
    sentences.insert(place, needles[0])
    return _Ask([*hay.leading, *(t for s in sentences for t in s), *asked], str(codes[0]))


def _copy(hay: Haystack, length: int, depth: float, rng: random.Random) -> _Ask:
    """Random words, then the same again up to `depth`; the answer is the next four."""
    room = (length - len(hay.leading)) // 2
    words: list[str] = []
    size = 0
    while True:
        word = rng.choice(WORDS)
        size += len(hay.encode(" " + word))
        if size > room - len(hay.encode(".")):
            break
        words.append(word)
    if len(words) < 8:
        raise InputError(f"{length} tokens are too few to copy from")
    at = 3 + round(depth * (len(words) - 7))
    text = " " + " ".join(words) + "." + " " + " ".join(words[:at])
    return _Ask([*hay.leading, *hay.encode(text)], " ".join(words[at : at + 4]))


def lengths_of(most: int) -> list[int]:
    """512, 1024 … as far as a window of `most` tokens goes; the window itself where it is shorter."""
    doubled = itertools.takewhile(lambda length: length <= most, (SHORTEST << i for i in itertools.count()))
    return list(doubled) or [most]


_MAKERS: dict[str, Callable[[Haystack, int, float, random.Random], _Ask]] = {
    "needle": partial(_needle, keys=1),
    "needle_multikey": partial(_needle, keys=KEYS),
    "copy": _copy,
}
TASKS = tuple(_MAKERS)


def find(
    scorer: Scorer, task: str, lengths: Sequence[int] = (), count: int = NEEDLES, text: str | None = None
) -> list[Cell]:
    """The map of a task: `count` prompts in each cell, ten depths a length, answered greedily and compared exactly.

    lengths: in tokens; 512, 1024 … up to the model's window if none is given. text: what needles are hidden in; plain
    sentences if None. Prompts of a length differ by depth alone as far as they can, so the engine's prefix cache has
    what stands before the shallower needle.

    Raises:
        InputError: a length is beyond the model's window, or has no room for the task.
    """
    most = scorer.max_length + 1
    if beyond := [length for length in lengths if length > most]:
        raise InputError(f"a haystack of {beyond[0]} tokens is beyond the model's window of {most}")
    hay, make, cells = Haystack(scorer.tokenizer, text), _MAKERS[task], []
    for length in lengths or lengths_of(most):
        depths = [i / (DEPTHS - 1) for i in range(DEPTHS)]
        asks = [make(hay, length, d, random.Random(f"{task}/{length}/{i}")) for i in range(count) for d in depths]
        room = max(len(hay.encode(" " + ask.answer)) for ask in asks) + 1
        answers = scorer.continued([ask.prompt for ask in asks], room)
        right = [_says(answer, ask.answer) for answer, ask in zip(answers, asks, strict=True)]
        cells += [Cell(length, d, sum(right[j::DEPTHS]) / count) for j, d in enumerate(depths)]
    return cells


def _says(answer: str, wanted: str) -> bool:
    """Whether an answer begins with what was asked for, and no further digit or letter."""
    said = answer.strip()
    return said.startswith(wanted) and not said[len(wanted) :][:1].isalnum()


def figures(cells: Sequence[Cell], count: int) -> dict[str, Any]:
    """What `leanseek eval` says of a map."""
    share = sum(cell.accuracy for cell in cells) / len(cells)
    green = sum(cell.accuracy >= GREEN for cell in cells) / len(cells)
    return {"accuracy": share, "green": green, "samples": count * len(cells), "map": [c._asdict() for c in cells]}


def draw(axes: Axes, cells: Sequence[Cell], title: str) -> None:
    """The map: lengths from left to right, depths from top to bottom."""
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    found = {(cell.length, cell.depth): cell.accuracy for cell in cells}
    grid = [[found[length, depth] for length in lengths] for depth in depths]
    axes.imshow(grid, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth", title=title)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7)


def check_picture(path: Path) -> None:
    """Before a model is asked for hours.

    Raises:
        InputError: the file's name or folder will not do.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--picture {path} must end in .png or .svg")
    if not path.parent.is_dir():
        raise InputError(f"--picture {path}: there is no folder {path.parent}")


def save_picture(path: Path, maps: Mapping[str, Sequence[Cell]]) -> None:
    """One map beside the other.

    Raises:
        InputError: the file cannot be written.
    """
    from leanseek.plotting import Figure  # matplotlib takes a second to import

    figure = Figure(figsize=(0.6 + 3.2 * len(maps), 3.6), layout="constrained")
    for axes, (title, cells) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        draw(axes, cells, title)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"--picture {path}: {error.strerror}") from None
