"""Text and tokens: a byte-level tokenizer.json, and text that grows a token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import tokenizers

from leanseek.engine.params import EngineError
from leanseek.errors import InputError
from leanseek.tokens import open_tokenizer, read_object


class Tokenizer:
    """A byte-level BPE out of a Hugging Face folder, as every model of this family has.

    Raises:
        EngineError: the file cannot be read, or is not byte-level.
    """

    def __init__(self, folder: Path):
        self.file = folder / "tokenizer.json"
        try:
            self.inner = open_tokenizer(self.file)
            config = read_object(folder / "tokenizer_config.json")
        except InputError as error:
            raise EngineError(str(error)) from None
        if not isinstance(self.inner.decoder, tokenizers.decoders.ByteLevel):
            raise EngineError(f"{self.file} is not byte-level; this family's tokenizers are")
        self.bos_token_id = self._leading_token(config)
        self._added = self.inner.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, added in self._added.items() if added.special)

    def _leading_token(self, config: dict[str, object]) -> int | None:
        """The token that `add_bos_token` puts before a text: transformers adds it outside tokenizer.json."""
        bos = config.get("bos_token")
        content = bos.get("content") if isinstance(bos, dict) else bos
        return self.inner.token_to_id(str(content)) if config.get("add_bos_token") and content else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens spelled in it become themselves."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def least_tokens(self, text: str) -> int:
        """How many tokens a text has at least, without splitting it: no token spells more than the longest."""
        return len(text) // self._longest

    @cached_property
    def _longest(self) -> int:
        """Bytes: each is a character in the vocabulary's spelling. A text has at least as many bytes as characters."""
        spelled = max(map(len, self.inner.get_vocab(with_added_tokens=False)), default=1)
        return max([spelled, *(len(token.content) for token in self._added.values())])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    @cache  # noqa: B019  (one tokenizer lives as long as its process)
    def token_bytes(self, token: int) -> bytes:
        """What a token spells: bytes, because a character may span tokens. Ids without a token spell nothing."""
        if token in self._added:
            return str(self._added[token].content).encode()
        spelled = self.inner.id_to_token(token)
        if spelled is None:
            return b""
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in spelled):
            return bytes(alphabet[character] for character in spelled)
        return str(spelled).encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The character a byte-level vocabulary writes for each byte (GPT-2's): printable bytes are themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TextStream:
    """Text out of tokens as they come: whole characters only, and nothing that may be the start of a stop string."""

    __slots__ = ("_bytes", "_held", "_include_stop", "_skipped", "_spell", "_stop")

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], skip_special: bool, include_stop: bool):
        self._spell = tokenizer.token_bytes
        self._stop = tuple(stop)
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._include_stop = include_stop
        self._bytes = b""  # not yet decoded
        self._held = ""  # decoded and not yet given out

    def add(self, token: int, match_stop: bool = True) -> str | None:
        """Take a token; the stop string it completes, if any, ends the text."""
        if token in self._skipped:
            return None
        self._bytes += self._spell(token)
        if not self._stop:
            return None
        searched = len(self._held)
        self._held += self._decode(final=False)
        if not match_stop:
            return None
        found = []
        for stop in self._stop:
            place = self._held.find(stop, max(0, searched - len(stop) + 1))
            if place >= 0:
                found.append((place, -len(stop), stop))
        if not found:
            return None
        place, _, stop = min(found)  # the first; of two at one place, the longer
        self._held = self._held[: place + (len(stop) if self._include_stop else 0)]
        self._bytes, self._stop = b"", ()
        return stop

    def take(self, final: bool) -> str:
        """The text that can be given out now; all of it when `final`."""
        text = self._held + self._decode(final)
        if final or not self._stop:
            self._held = ""
            return text
        given = len(text) - self._possible_stop(text)
        self._held = text[given:]
        return text[:given]

    def _decode(self, final: bool) -> str:
        """The whole characters of the bytes there are; a beginning of one stays unless it is `final`."""
        text, used = codecs.utf_8_decode(self._bytes, "replace", final)
        self._bytes = self._bytes[used:]
        return text

    def _possible_stop(self, text: str) -> int:
        """Length of the longest tail that a stop string starts with."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
