"""What a tokenizer's files say: its tokenizer.json without stored state, and which tokens begin and end a text."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from tokenizers import Tokenizer, models

from leanseek.errors import InputError
from leanseek.reading import Structure, parse_json, read_bytes, read_optional_json, shorten

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
CONFIG, MAP, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"

# What the tokens are called where no file beside the tokenizer.json names them.
_BEGINS = (BOS, "<|begin_of_text|>", "<s>", "[BOS]", "<bos>")
_ENDS = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "[EOS]", "<eos>")
_LONG = 1 << 16  # characters encoded at a time: the library keeps some 500 bytes a token
_AROUND = 512  # characters on each side of a cut that show whether it changes the tokens
_STRETCH = 1 << 20  # characters without such a cut, after which a text is cut all the same: 10 million blanks panic
_GROWTH = 32  # times its length that a normalizer may make of a text
_TEMPLATE = 1 << 13  # bytes that describe what is put around a text: real ones have some hundreds


class TokenizerError(InputError):
    """A tokenizer's file that cannot be used; the message names it."""


class Added(Structure):
    """A token that is in no merge."""

    content: str


class Named(Structure):
    """One of several templates."""

    name: str
    template: str


class Names(Structure):
    """What is read of a tokenizer_config.json or a special_tokens_map.json."""

    bos_token: str | Added | None = None
    eos_token: str | Added | None = None
    add_bos_token: bool | None = None
    added_tokens_decoder: dict[str, Added] = Field(default_factory=dict)
    chat_template: str | list[Named] | None = None


class SpecialTokens(NamedTuple):
    """Ids. The first of `eos` ends a document; `leading` is what encoding a text puts before it."""

    bos: int | None
    eos: tuple[int, ...]
    leading: tuple[int, ...]


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which gives a text the same ids every time.

    Padding, truncation and BPE dropout, which the file may store, are switched off.

    Raises:
        TokenizerError: no such file, not a tokenizer.json, one that fails at its first text, or one that makes a text
            many times as long.
    """
    if not os.path.lexists(path):
        raise TokenizerError(f"no tokenizer at {path}")
    content = read_bytes(path, TokenizerError)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as error:
        raise TokenizerError(f"{path} is not a tokenizer.json ({library_error(error)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    _check_growth(tokenizer, path)
    try:
        around(tokenizer)
    except TokenizerError as error:
        raise TokenizerError(f"{path} cannot be used: {error}") from None
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Ids of a text without what belongs around it, a part of some 65,000 characters at a time.

    Other threads run meanwhile. The parts' ids together are the whole's: a text is cut only where that changes nothing,
    unless a million characters go by without such a place.

    Raises:
        TokenizerError: the tokenizer cannot take the text.
    """
    for start, end in _parts(tokenizer, text):
        yield _encoded(tokenizer, text[start:end])


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before a text and after it.

    Raises:
        TokenizerError: it fails, or does more than that.
    """
    known = (text for text in ("a", "0", " ", "\n") if _encoded(tokenizer, text))  # not every vocabulary has all
    text = next(known, "a")
    plain, whole = _encoded(tokenizer, text), _encoded(tokenizer, text, special=True)
    places = range(len(whole) - len(plain) + 1)
    start = next((i for i in places if whole[i : i + len(plain)] == plain), None)
    if start is None:
        raise TokenizerError("its post_processor changes the tokens of a text")
    return whole[:start], whole[start + len(plain) :]


def _encoded(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """Of a batch, because the library lets other threads run only then; it is twice as fast, too."""
    try:
        found: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
    except BaseException as error:
        raise TokenizerError(f"the tokenizer cannot take the text ({library_error(error)})") from None
    return found


def _parts(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, int]]:
    """Where a long text is cut to be encoded: where its surroundings, cut, have the same tokens as whole."""
    start, least = 0, _LONG
    while least < len(text):
        after = (text.find(mark, least, least + _LONG // 2) for mark in ("\n", " "))
        places = (place for found in after if found >= 0 for place in (found, found + 1))
        cut = next((place for place in (*places, least) if _separable(tokenizer, text, place)), None)
        if cut is None and least - start >= _STRETCH:
            cut = least
        if cut is not None:
            yield start, cut
            start = cut
        least = (cut or least) + _LONG
    yield start, len(text)


def _separable(tokenizer: Tokenizer, text: str, place: int) -> bool:
    """Seen twice, from one character apart: a cut between two tokens of `aaaa` in a row is not one in `aaa`."""
    after = text[place : place + _AROUND]
    for length in (_AROUND, _AROUND - 1):
        before = text[max(0, place - length) : place]
        both = _encoded(tokenizer, before) + _encoded(tokenizer, after)
        if not (before and after) or _encoded(tokenizer, before + after) != both:
            return False
    return True


def _check_growth(tokenizer: Tokenizer, path: Path) -> None:
    """Raises TokenizerError: a short text would take all memory."""
    if tokenizer.normalizer is not None and (growth := _growth(_state(tokenizer.normalizer))) > _GROWTH:
        raise TokenizerError(f"{path}: its normalizer makes a text up to {growth:,.0f} times as long")
    if tokenizer.post_processor is not None and len(tokenizer.post_processor.__getstate__()) > _TEMPLATE:
        raise TokenizerError(f"{path}: its post_processor puts too much around a text")


def _growth(normalizer: dict[str, Any]) -> float:
    """How many times as long a text becomes at most."""
    match normalizer:
        case {"type": "Sequence", "normalizers": list(steps)}:
            return math.prod(map(_growth, steps))
        case {"type": "Prepend", "prepend": str(prepended)}:
            return 1.0 + len(prepended)
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return max(1.0, len(content) / max(1, len(pattern)))
        case {"type": "Replace", "content": str(content)}:  # a pattern may match between any two characters
            return 1.0 + len(content)
    return 1.0


def _state(part: Any) -> dict[str, Any]:
    return parse_json(part.__getstate__(), "a part of a tokenizer.json", TokenizerError)


def library_error(error: BaseException) -> str:
    """In a line, what the tokenizers library raised: a bare Exception, or a panic, which is none. Others are raised."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return shorten((str(error).splitlines() or [type(error).__name__])[0], 300)


def special_tokens(tokenizer: Tokenizer, folder: Path) -> SpecialTokens:
    """The tokens that the files of `folder` name; without them, the usual names in the vocabulary.

    An end token that only generation_config.json has ends a text too, but no document.

    Raises:
        TokenizerError: a file names a token that the tokenizer lacks, or there is no end token at all.
    """
    config = read_optional_json(folder / CONFIG, TokenizerError)
    end = named_token(folder, "eos_token", tokenizer)
    ends = ([] if end is None else [end]) + _ids(folder / GENERATION, "eos_token_id", tokenizer)
    ends = ends or _ids(folder / "config.json", "eos_token_id", tokenizer) or _known(_ENDS, tokenizer)
    if not ends:
        raise TokenizerError(
            f"the tokenizer has none of the end-of-document tokens {', '.join(_ENDS)}; name its own as eos_token in a "
            f"{CONFIG} beside the tokenizer.json"
        )
    begin = named_token(folder, "bos_token", tokenizer)
    if begin is None and "bos_token" not in config:  # null says that there is none
        begin = next(iter(_ids(folder / GENERATION, "bos_token_id", tokenizer) or _known(_BEGINS, tokenizer)), None)
    leading, _ = around(tokenizer)
    if config.get("add_bos_token") and begin is not None and begin not in leading[:1]:
        leading = [begin, *leading]
    return SpecialTokens(begin, tuple(dict.fromkeys(ends)), tuple(leading))


def named(value: str | dict[str, Any] | None) -> str | None:
    """The text of a token as a tokenizer_config.json gives it: that, or an object with more about it."""
    return value.get("content") if isinstance(value, dict) else value


def named_token(folder: Path, key: str, tokenizer: Tokenizer) -> int | None:
    """The id of what the files of `folder` call `key`; None where they do not.

    Raises:
        TokenizerError: it is not a token of the tokenizer.
    """
    for name in (CONFIG, MAP):
        value = named(read_optional_json(folder / name, TokenizerError).get(key))
        if value is None:
            continue
        token = tokenizer.token_to_id(value) if isinstance(value, str) else None
        if token is None:
            raise TokenizerError(
                f"{folder / name} names {key} {shorten(repr(value))}, which is not in the tokenizer.json"
            )
        return token
    return None


def _ids(path: Path, key: str, tokenizer: Tokenizer) -> list[int]:
    value = read_optional_json(path, TokenizerError).get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < 2**32 or tokenizer.id_to_token(token) is None:
            raise TokenizerError(f"{path} names {key} {shorten(repr(token))}, which is not in the tokenizer.json")
    return ids


def _known(names: tuple[str, ...], tokenizer: Tokenizer) -> list[int]:
    found = (tokenizer.token_to_id(name) for name in names)
    return [token for token in found if token is not None][:1]
