"""The data of `make reason`: text and traces to pre-train on, chats, prompts with their answers.

    python experiments/reason/data.py --corpus corpora/shakespeare --out data/reason --seed 0

The task is the sum of three numbers of three digits. An answer is short (the sum) or long (first a thought that adds
column by column, the last digits first, each column with the carry before it). Everything is a function of the seed.
Problems for testing have operands that occur nowhere else, in any order: their hash decides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from leanseek.tokens import BOS, EOS, PAD

VOCABULARY = 512
USER, ASSISTANT, THINK, CLOSE = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
# As R1's, but whether to think is left to the model, and a thought is kept where the conversation ends with it.
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    f"{{%- if message.role == 'user' -%}}{{{{- '{USER}' + message.content -}}}}"
    f"{{%- elif message.role == 'assistant' -%}}{{{{- '{ASSISTANT}' -}}}}"
    f"{{{{- message.content if loop.last else message.content.split('{CLOSE}')[-1] -}}}}"
    f"{{%- if not message.prefix -%}}{{{{- '{EOS}' -}}}}{{%- endif -%}}"
    "{%- else -%}{{- message.content -}}{%- endif -%}{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{ASSISTANT}' -}}}}{{%- endif -%}}"
)
SIZES = {
    "traces": 20_000,  # documents
    "text": 150_000,  # bytes
    "sft": 8_000,
    "rl": 4_000,
    "distil": 3_000,
    "test": 500,
    "dev": 500,
}
LONG = 0.25  # share of SFT's answers that think
Operands = tuple[int, ...]

# ---- the task ----


def split_of(operands: Sequence[int]) -> str:
    """test, dev or train, by the hash of the operands in any order: a twentieth each of the first two."""
    name = " ".join(map(str, sorted(operands)))
    return {0: "test", 1: "dev"}.get(hashlib.blake2b(name.encode(), digest_size=8).digest()[0] % 20, "train")


def problem(operands: Sequence[int]) -> str:
    return f"What is {'+'.join(map(str, operands))}?"


def column(terms: Sequence[int], total: int) -> str:
    """Spaces, not +, so that no digit of a thought looks like the first one of a number that is asked for."""
    return f"{' '.join(map(str, terms))}={total:02d}"


def columns(operands: Sequence[int]) -> list[str]:
    """The columns of a sum, last digits first, each with the carry of the one before it in front.

    Always with a carry and with a total of two digits: what stands where is then the same in all sums, and a small
    network learns to look digits up many times sooner (docs/log.md).
    """
    lines, carry = [], 0
    for place in range(max(len(str(n)) for n in operands)):
        terms = [carry, *(n // 10**place % 10 for n in operands)]
        lines.append(column(terms, sum(terms)))
        carry = sum(terms) // 10
    return lines


def long_answer(operands: Sequence[int]) -> str:
    return f"{THINK}{chr(10).join(columns(operands))}{CLOSE}{sum(operands)}"


def draw(chance: random.Random, split: str, count: int, low: int = 100, high: int = 999) -> Iterator[Operands]:
    """Distinct triples of a split."""
    seen: set[Operands] = set()
    while len(seen) < count:
        operands = tuple(chance.randint(low, high) for _ in range(3))
        if split_of(operands) == split and operands not in seen:
            seen.add(operands)
            yield operands


# ---- pre-training ----


def _sum(chance: random.Random) -> str:
    """A problem and its thought, in the tags of an answer. Never one that is held out.

    A token that pre-training never sees has a logit that SFT does not lift again within an epoch (docs/log.md).
    """
    while split_of(operands := [chance.randint(100, 999) for _ in range(3)]) != "train":
        pass
    return f"{problem(operands)}{long_answer(operands)}"


def _plain_sum(chance: random.Random) -> str:
    """A small sum with nothing but its result."""
    while True:
        operands = [chance.randint(1, 99) for _ in range(chance.choice((2, 3)))]
        if split_of(operands) == "train":
            return f"{'+'.join(map(str, operands))}={sum(operands)}"


def _digits(chance: random.Random) -> str:
    digits = [chance.randint(0, 2), *(chance.randint(0, 9) for _ in range(3))]
    return column(digits, sum(digits))


def _copy(chance: random.Random) -> str:
    text = "".join(chance.choice("0123456789") for _ in range(chance.randint(3, 9)))
    return f"copy {text}: {text}"


def _reverse(chance: random.Random) -> str:
    text = "".join(chance.choice("0123456789") for _ in range(chance.randint(3, 6)))
    return f"reverse {text}: {text[::-1]}"


TRACES: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_sum, 8), (_plain_sum, 1), (_digits, 2), (_copy, 1), (_reverse, 1),
)  # fmt: skip


def traces(chance: random.Random, count: int, thoughts: bool = True) -> Iterator[str]:
    """Documents of a few exercises each; without thoughts, of those that do not think."""
    kinds, weights = zip(*(one for one in TRACES if thoughts or one[0] is not _sum), strict=True)
    for _ in range(count):
        yield "\n".join(kind(chance) for kind in chance.choices(kinds, weights, k=3)) + "\n"


def texts(corpus: Path, size: int) -> Iterator[str]:
    """Paragraphs of a corpus, about `size` bytes in all, evenly from its files."""
    files = sorted(corpus.rglob("*.txt"))
    if not files:
        raise SystemExit(f"{corpus} holds no .txt; leanseek data fetch shakespeare --out {corpus}")
    for file in files:
        taken = 0
        for part in file.read_text(encoding="utf-8", errors="replace").replace("\r", "").split("\n\n"):
            if part.strip() and not any(c.isdigit() for c in part):  # numbers come from the traces alone
                yield part.strip() + "\n"
                taken += len(part.encode())
            if taken >= size // len(files):
                break


# ---- tokenizer ----


def train_tokenizer(documents: Iterable[str]) -> Tokenizer:
    """A byte-level BPE in which each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2, special_tokens=[BOS, EOS, PAD, USER, ASSISTANT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator((text.replace(THINK, "").replace(CLOSE, "") for text in documents), trainer)
    tokenizer.add_tokens([THINK, CLOSE])  # not special: they are text of an answer
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


# ---- chats, prompts ----


def chat(operands: Sequence[int], answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": problem(operands)}, {"role": "assistant", "content": answer}]}


def prompt(operands: Sequence[int]) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": problem(operands)}], "answer": str(sum(operands))}


# ---- all of it ----


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make(corpus: Path, out: Path, seed: int = 0, sizes: dict[str, int] = SIZES) -> None:
    """Write tokenizer/ and the .jsonl files into `out`: pretrain, student, sft, sft-short, rl, distil, and held out
    dev, test, sft-dev."""

    def chance(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    out.mkdir(parents=True, exist_ok=True)
    for name, thoughts in (("student", False), ("pretrain", True)):
        documents = [*traces(chance("traces"), sizes["traces"], thoughts), *texts(corpus, sizes["text"])]
        chance("order").shuffle(documents)
        write_rows(out / f"{name}.jsonl", ({"text": text} for text in documents))
    chats = [problem(operands) for operands in draw(chance("tokenizer"), "train", 1000)]
    write_tokenizer(train_tokenizer([*documents[:20_000], *chats]), out / "tokenizer")

    style = chance("style")
    train = list(draw(chance("train"), "train", sizes["sft"] + sizes["rl"] + sizes["distil"]))
    parts: dict[str, list[Operands]] = {}
    for name in ("sft", "rl", "distil"):
        parts[name], train = train[: sizes[name]], train[sizes[name] :]
    thinks = [style.random() < LONG for _ in parts["sft"]]
    write_rows(
        out / "sft.jsonl",
        (chat(o, long_answer(o) if t else str(sum(o))) for o, t in zip(parts["sft"], thinks, strict=True)),
    )
    write_rows(out / "sft-short.jsonl", (chat(o, str(sum(o))) for o in parts["sft"]))
    write_rows(out / "rl.jsonl", map(prompt, parts["rl"]))
    write_rows(out / "distil.jsonl", map(prompt, parts["distil"]))
    for name in ("dev", "test"):
        held = list(draw(chance(name), name, sizes[name]))
        write_rows(out / f"{name}.jsonl", map(prompt, held))
        if name == "dev":
            write_rows(
                out / "sft-dev.jsonl", (chat(o, long_answer(o) if style.random() < LONG else str(sum(o))) for o in held)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by `leanseek data fetch shakespeare`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make(given.corpus, given.out, given.seed)


if __name__ == "__main__":
    main()
