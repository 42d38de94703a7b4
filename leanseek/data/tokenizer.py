"""Byte-level BPE (section 4.1): train one on the data, or use any tokenizer.json."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from leanseek.data.formats import DataError, pieces
from leanseek.reading import read_optional_json
from leanseek.tokens import BOS, CONFIG, EOS, GENERATION, MAP, PAD, around, open_tokenizer, special_tokens

FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
SPECIAL = (BOS, EOS, PAD, *FIM)
LONGEST_TOKEN = 256  # characters: a run of 100,000 dashes would otherwise become a token of its own
TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ("token_bytes.npy", "tokenizer.json", CONFIG, GENERATION, TEMPLATE)  # of a shard folder

# Merges do not cross the boundaries of these patterns. They are exactly V3's, because llama.cpp has those compiled in
# by name and splits differently for any others. Punctuation and the line breaks after it share a token, numbers come
# in groups of up to three digits, and runs of Chinese and Japanese are separate.
_NUMBERS = r"\p{{N}}{{1,{}}}"  # digits in a token at most
_IDEOGRAPHS = "[一-龥\u3040-ゟ゠-ヿ]+"
_WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, digits: int = 3) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` ids, special tokens first; the same texts give the same tokenizer.

    A token has `digits` digits at most; V3's have three.

    Raises:
        DataError: the vocabulary cannot hold the 256 bytes and the special tokens.
    """
    if vocab_size < 256 + len(SPECIAL):
        raise DataError(f"a byte-level vocabulary needs at least {256 + len(SPECIAL)} ids, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in (_NUMBERS.format(digits), _IDEOGRAPHS, _WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    # in pieces, because a long document would take hundreds of times its size in memory
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces([text])), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer.json, or the one in a folder; it never truncates, pads or drops merges.

    Raises:
        InputError: there is no such file, or it is not a tokenizer.json.
    """
    return open_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


def tokenizer_files(given: Path) -> list[Path]:
    """The files of a tokenizer: those of its folder, or the given file alone if it is not called tokenizer.json."""
    if given.name != "tokenizer.json" and not given.is_dir():
        return [given]
    folder = given if given.is_dir() else given.parent
    names = ("tokenizer.json", CONFIG, MAP, GENERATION, "config.json", TEMPLATE)
    return [folder / name for name in names if (folder / name).is_file()] or [given]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, given: Path | None = None) -> None:
    """Write tokenizer.json and the files that transformers and vLLM need to load it.

    Keeps the settings and the chat template of a `given` tokenizer. If it has Python code of its own, its class becomes
    the one with which transformers reads the tokenizer.json unchanged.

    Raises:
        InputError: the tokenizer has no end token, or its files contradict it.
    """
    files = {path.name: path for path in tokenizer_files(given)} if given is not None else {}
    source = files["tokenizer.json"].parent if len(files) > 1 else folder
    special = special_tokens(tokenizer, source)
    config = read_optional_json(files[CONFIG]) if CONFIG in files else {}
    named = {"bos_token": special.bos, "eos_token": special.eos[0], "pad_token": tokenizer.token_to_id(PAD)}
    for key, token in named.items():
        if config.get(key) is None and token is not None:
            config[key] = tokenizer.id_to_token(token)
    if config.pop("auto_map", None) is not None or "tokenizer_class" not in config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if list(special.leading) != around(tokenizer)[0]:
        tokenizer = _beginning_with(tokenizer, special.leading[0])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write(folder / CONFIG, config)
    if len(special.eos) > 1:
        _write(folder / GENERATION, {"eos_token_id": list(special.eos)})
    if TEMPLATE in files:
        shutil.copyfile(files[TEMPLATE], folder / TEMPLATE)


def _beginning_with(tokenizer: Tokenizer, token: int) -> Tokenizer:
    """The tokenizer with a post-processor that puts `token` before a text. The model was trained with the token, but
    transformers 5 ignores `add_bos_token` unless the tokenizer's own class implements it."""
    spec, name = json.loads(tokenizer.to_str()), tokenizer.id_to_token(token)
    first, a, b = {"SpecialToken": {"id": name, "type_id": 0}}, *({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
    named = {name: {"id": name, "ids": [token], "tokens": [name]}}
    step = {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, b], "special_tokens": named}
    before = [spec["post_processor"]] if spec["post_processor"] else []
    spec["post_processor"] = {"type": "Sequence", "processors": [*before, step]} if before else step
    return Tokenizer.from_str(json.dumps(spec))


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def fim_tokens(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    """Ids of fim_begin, fim_hole and fim_end, or None if the tokenizer lacks them."""
    begin, hole, end = (tokenizer.token_to_id(name) for name in FIM)
    return None if begin is None or hole is None or end is None else (begin, hole, end)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Number of UTF-8 bytes of each id, [largest id + 1] uint32; 0 for special tokens and unused ids.

    Turns loss per token into bits per byte, which is comparable across tokenizers. Byte-level tokens have one character
    of the byte alphabet per byte, so the count is exact. Other kinds (SentencePiece) write a space as a low bar and a
    single byte as <0xNN>. Added tokens that are not special count as written.
    """
    byte_level = tokenizer.decoder is not None and b"ByteLevel" in tokenizer.decoder.__getstate__()
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.uint32)
    for token, index in vocabulary.items():
        if index in added:
            sizes[index] = 0 if added[index].special else len(token.encode())
        elif byte_level:
            sizes[index] = len(token)
        else:
            sizes[index] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
    return sizes
