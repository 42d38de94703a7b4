"""Byte-level BPE (section 4.1): train one on the data, or take the one in any tokenizer.json."""

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

# What the merges may not cross: V3's own patterns, to the letter, since llama.cpp has them compiled in under a name and
# splits otherwise for any other. Punctuation takes the line breaks that follow it into one token, numbers come in
# groups of up to three digits, and Chinese and Japanese runs stand alone.
_NUMBERS = r"\p{N}{1,3}"
_IDEOGRAPHS = "[一-龥\u3040-ゟ゠-ヿ]+"
_WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` ids, special tokens first; the same texts give the same tokenizer.

    Raises:
        DataError: the vocabulary cannot hold the 256 bytes and the special tokens.
    """
    if vocab_size < 256 + len(SPECIAL):
        raise DataError(f"a byte-level vocabulary needs at least {256 + len(SPECIAL)} ids, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in (_NUMBERS, _IDEOGRAPHS, _WORDS)]
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
    # in pieces, or one long document takes hundreds of times its size in memory
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces([text])), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder that holds one; it never truncates, pads or drops merges.

    Raises:
        InputError: no such file, or not a tokenizer.json.
    """
    return open_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


def tokenizer_files(given: Path) -> list[Path]:
    """The files that describe a given tokenizer: a folder's, or a lone file where it is not called tokenizer.json."""
    if given.name != "tokenizer.json" and not given.is_dir():
        return [given]
    folder = given if given.is_dir() else given.parent
    names = ("tokenizer.json", CONFIG, MAP, GENERATION, "config.json", TEMPLATE)
    return [folder / name for name in names if (folder / name).is_file()] or [given]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, given: Path | None = None) -> None:
    """tokenizer.json, and the files beside it with which transformers and vLLM load it.

    What the files of a `given` tokenizer say is kept, its chat template too. transformers' class for a tokenizer with
    Python code of its own becomes the one that reads the tokenizer.json as it is.

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
    """The tokenizer, putting `token` before a text by its own post-processor: transformers 5 does not heed
    `add_bos_token` where a class of its own would have done so, and the model was trained with the token."""
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
    """Ids of fim_begin, fim_hole and fim_end, or None where the tokenizer has no such tokens."""
    begin, hole, end = (tokenizer.token_to_id(name) for name in FIM)
    return None if begin is None or hole is None or end is None else (begin, hole, end)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes each id stands for, [largest id + 1] uint32; special tokens and unused ids stand for none.

    With it a loss per token becomes bits per byte, which compares tokenizers. A byte-level token is spelled with one
    character of the byte alphabet per byte: the count is exact. Other kinds (SentencePiece) spell a space as a low bar
    and a lone byte as <0xNN>. Added tokens that are not special are spelled as themselves.
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
