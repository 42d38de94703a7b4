"""What a tokenizer's files say: its tokenizer.json without stored state, and which tokens begin and end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models

from leanseek.errors import InputError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
CONFIG, MAP, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"

# What the tokens are called where no file beside the tokenizer.json names them.
_BEGINS = (BOS, "<|begin_of_text|>", "<s>", "[BOS]", "<bos>")
_ENDS = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "[EOS]", "<eos>")
_LARGEST = 1 << 26  # bytes of a JSON file that is read here


class TokenizerError(InputError):
    """A tokenizer's file that cannot be used; the message names it."""


class SpecialTokens(NamedTuple):
    """Ids. The first of `eos` ends a document; `leading` is what encoding a text puts before it."""

    bos: int | None
    eos: tuple[int, ...]
    leading: tuple[int, ...]


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which gives a text the same ids every time.

    Padding, truncation and BPE dropout, which the file may store, are switched off.

    Raises:
        TokenizerError: no such file, or not a tokenizer.json.
    """
    if not path.is_file():
        raise TokenizerError(f"no tokenizer at {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:
        raise TokenizerError(f"{path} is not a tokenizer.json ({library_error(error)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def library_error(error: BaseException) -> str:
    """In a line, what the tokenizers library raised: a bare Exception, or a panic, which is none. Others are raised."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def special_tokens(tokenizer: Tokenizer, folder: Path) -> SpecialTokens:
    """The tokens that the files of `folder` name; without them, the usual names in the vocabulary.

    An end token that only generation_config.json has ends a text too, but no document.

    Raises:
        TokenizerError: a file names a token that the tokenizer lacks, or there is no end token at all.
    """
    config = read_object(folder / CONFIG)
    end = _named(folder, "eos_token", tokenizer)
    ends = ([] if end is None else [end]) + _ids(folder / GENERATION, "eos_token_id", tokenizer)
    ends = ends or _ids(folder / "config.json", "eos_token_id", tokenizer) or _known(_ENDS, tokenizer)
    if not ends:
        raise TokenizerError(
            f"the tokenizer has none of the end-of-document tokens {', '.join(_ENDS)}; name its own as eos_token in a "
            f"{CONFIG} beside the tokenizer.json"
        )
    begin = _named(folder, "bos_token", tokenizer)
    if begin is None and "bos_token" not in config:  # null says that there is none
        begin = next(iter(_ids(folder / GENERATION, "bos_token_id", tokenizer) or _known(_BEGINS, tokenizer)), None)
    leading = _leading(tokenizer)
    if config.get("add_bos_token") and begin is not None and begin not in leading[:1]:
        leading = [begin, *leading]
    return SpecialTokens(begin, tuple(dict.fromkeys(ends)), tuple(leading))


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} where there is no file.

    Raises:
        TokenizerError: not JSON, not an object, or of unreasonable size.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > _LARGEST:
        raise TokenizerError(f"{path} has more than {_LARGEST >> 20} MiB")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON that can be read: {error}") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{path} must hold an object, not {type(found).__name__}")
    return found


def _named(folder: Path, key: str, tokenizer: Tokenizer) -> int | None:
    for name in (CONFIG, MAP):
        value = read_object(folder / name).get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        try:
            token = tokenizer.token_to_id(value) if isinstance(value, str) else None
        except UnicodeEncodeError:  # half a surrogate pair
            token = None
        if token is None:
            raise TokenizerError(f"{folder / name} names {key} {value!r}, which is not in the tokenizer.json")
        return token
    return None


def _ids(path: Path, key: str, tokenizer: Tokenizer) -> list[int]:
    value = read_object(path).get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < 2**32 or tokenizer.id_to_token(token) is None:
            raise TokenizerError(f"{path} names {key} {token!r}, which is not in the tokenizer.json")
    return ids


def _known(names: tuple[str, ...], tokenizer: Tokenizer) -> list[int]:
    found = (tokenizer.token_to_id(name) for name in names)
    return [token for token in found if token is not None][:1]


def _leading(tokenizer: Tokenizer) -> list[int]:
    """Ids that the post-processor puts before a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    places = range(len(whole) - len(plain) + 1)
    return whole[: next((i for i in places if whole[i : i + len(plain)] == plain), 0)]
