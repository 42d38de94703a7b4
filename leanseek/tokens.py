"""Reads a tokenizer's files: the tokenizer.json without its stored state, and which tokens begin and end a text."""

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

# Usual names of the tokens, for when no file beside the tokenizer.json names them.
_BEGINS = (BOS, "<|begin_of_text|>", "<s>", "[BOS]", "<bos>")
_ENDS = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "[EOS]", "<eos>")
_LONG = 1 << 16  # characters encoded at a time: the library needs some 500 bytes per token
_AROUND = 512  # characters on each side of a cut that we encode to see whether the cut changes the tokens
_STRETCH = (
    1 << 20
)  # after this many characters without a good cut, cut anyway: 10 million blanks make the library panic
_GROWTH = 32  # a normalizer may make a text at most this many times as long
_TEMPLATE = 1 << 13  # most bytes of a post-processor: real ones have a few hundred


class TokenizerError(InputError):
    """A tokenizer file that cannot be used; the message names it."""


class Added(Structure):
    """A token that is not part of the merges."""

    content: str


class Named(Structure):
    """One of several chat templates."""

    name: str
    template: str


class Names(Structure):
    """The keys that we read from a tokenizer_config.json or a special_tokens_map.json."""

    bos_token: str | Added | None = None
    eos_token: str | Added | None = None
    add_bos_token: bool | None = None
    added_tokens_decoder: dict[str, Added] = Field(default_factory=dict)
    chat_template: str | list[Named] | None = None


class SpecialTokens(NamedTuple):
    """Token ids. The first of `eos` ends a document; encoding puts `leading` before a text."""

    bos: int | None
    eos: tuple[int, ...]
    leading: tuple[int, ...]


def open_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer.json, and makes it encode a text the same way every time.

    Padding, truncation and BPE dropout, which the file may store, are switched off.

    Raises:
        TokenizerError: there is no such file, it is not a tokenizer.json, or its tokenizer fails at the first text or
            makes a text many times as long.
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
    """Ids of a text without special tokens around it, in parts of about 65,000 characters.

    Other threads run meanwhile. Together the parts have the ids of the whole text: it is cut only where that changes
    nothing, unless a million characters have no such place.

    Raises:
        TokenizerError: the tokenizer cannot take the text.
    """
    for start, end in _parts(tokenizer, text):
        yield _encoded(tokenizer, text[start:end])


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text.

    Raises:
        TokenizerError: the post-processor fails or does more than that.
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
    """Encodes a batch of one: only for batches does the library let other threads run, and it is twice as fast."""
    try:
        found: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
    except BaseException as error:
        raise TokenizerError(f"the tokenizer cannot take the text ({library_error(error)})") from None
    return found


def _parts(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, int]]:
    """Start and end of the parts of a long text, cut where that leaves the tokens around the cut unchanged."""
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
    """Whether a cut leaves the tokens as they are. Tried with two lengths of context: in a run of `a`, a place may fall
    between two tokens of `aaaa` for one length only."""
    after = text[place : place + _AROUND]
    for length in (_AROUND, _AROUND - 1):
        before = text[max(0, place - length) : place]
        both = _encoded(tokenizer, before) + _encoded(tokenizer, after)
        if not (before and after) or _encoded(tokenizer, before + after) != both:
            return False
    return True


def _check_growth(tokenizer: Tokenizer, path: Path) -> None:
    """Raises TokenizerError if a short text could take all memory."""
    if tokenizer.normalizer is not None and (growth := _growth(_state(tokenizer.normalizer))) > _GROWTH:
        raise TokenizerError(f"{path}: its normalizer makes a text up to {growth:,.0f} times as long")
    if tokenizer.post_processor is not None and len(tokenizer.post_processor.__getstate__()) > _TEMPLATE:
        raise TokenizerError(f"{path}: its post_processor puts too much around a text")


def _growth(normalizer: dict[str, Any]) -> float:
    """How many times as long a text can become."""
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
    """What the tokenizers library raised, in one line: a bare Exception, or a panic, which is not an Exception.
    Anything else is raised again."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return shorten((str(error).splitlines() or [type(error).__name__])[0], 300)


def special_tokens(tokenizer: Tokenizer, folder: Path) -> SpecialTokens:
    """The tokens that the files in `folder` name, or else those with the usual names.

    End tokens that only generation_config.json names also end a text, but not a document.

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
    if begin is None and "bos_token" not in config:  # null means that there is none
        begin = next(iter(_ids(folder / GENERATION, "bos_token_id", tokenizer) or _known(_BEGINS, tokenizer)), None)
    leading, _ = around(tokenizer)
    if config.get("add_bos_token") and begin is not None and begin not in leading[:1]:
        leading = [begin, *leading]
    return SpecialTokens(begin, tuple(dict.fromkeys(ends)), tuple(leading))


def named(value: str | dict[str, Any] | None) -> str | None:
    """The text of a token in a tokenizer_config.json, which is a string or an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def named_token(folder: Path, key: str, tokenizer: Tokenizer) -> int | None:
    """The id of the token that the files in `folder` name as `key`; None if they do not.

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
