"""Byte-level BPE (section 4.1): train one on the data, or read any tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from leanseek.data.files import DataError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
SPECIAL = (BOS, EOS, PAD, *FIM)

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
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder that holds one; it never truncates or pads.

    Raises:
        DataError: no such file, or not a tokenizer.json.
    """
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, and the tokenizer_config.json with which transformers and vLLM load it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {k: v for k, v in names.items() if tokenizer.token_to_id(v) is not None}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def end_token(tokenizer: Tokenizer) -> int:
    """The id that ends a document.

    Raises:
        DataError: none of the known end tokens is in the vocabulary.
    """
    known = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "[EOS]", "<eos>")
    for name in known:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise DataError(f"the tokenizer has none of the end-of-document tokens {', '.join(known)}")


def fim_tokens(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    """Ids of fim_begin, fim_hole and fim_end, or None where the tokenizer has no such tokens."""
    begin, hole, end = (tokenizer.token_to_id(name) for name in FIM)
    return None if begin is None or hole is None or end is None else (begin, hole, end)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes each id stands for, [largest id + 1] uint16; special tokens and unused ids stand for none.

    With it a loss per token becomes bits per byte, which compares tokenizers. A byte-level token is spelled with one
    character of the byte alphabet per byte: the count is exact. Other kinds (SentencePiece) spell a space as a low bar
    and a lone byte as <0xNN>. Added tokens that are not special are spelled as themselves.
    """
    byte_level = tokenizer.decoder is not None and b"ByteLevel" in tokenizer.decoder.__getstate__()
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.uint16)
    for token, index in vocabulary.items():
        if index in added:
            sizes[index] = 0 if added[index].special else len(token.encode())
        elif byte_level:
            sizes[index] = len(token)
        else:
            sizes[index] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
    return sizes
