"""Text and tokens: a byte-level tokenizer.json, and streaming text token by token."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path

import tokenizers

from leanseek.engine.params import EngineError
from leanseek.engine.spans import Spans, SpanTracker
from leanseek.errors import InputError
from leanseek.reading import checked, read_optional_json
from leanseek.tokens import (
    CONFIG,
    Names,
    TokenizerError,
    around,
    encode,
    named_token,
    open_tokenizer,
)


class TooLong(EngineError):
    """The text has more tokens than the context holds."""


class Tokenizer:
    """The byte-level BPE of a Hugging Face folder; all models of this family have one.

    Raises:
        EngineError: the file cannot be read, or is not byte-level.
    """

    def __init__(self, folder: Path):
        self.file = folder / "tokenizer.json"
        try:
            self.inner = open_tokenizer(self.file)
            checked(Names, read_optional_json(folder / CONFIG), str(folder / CONFIG))
            self._before, self._after = around(self.inner)
            self.bos_token_id = self._leading_token(folder)
        except InputError as error:
            raise EngineError(str(error)) from None
        if not isinstance(self.inner.decoder, tokenizers.decoders.ByteLevel):
            raise EngineError(f"{self.file} is not byte-level; this family's tokenizers are")
        if self.inner.normalizer is not None and b"Precompiled" in self.inner.normalizer.__getstate__():
            raise EngineError(f"{self.file} has a Precompiled normalizer; this family's tokenizers have none")
        self._added = self.inner.get_added_tokens_decoder()
        self.added_ids = sorted(self._added)
        self.special_ids = frozenset(token for token, added in self._added.items() if added.special)
        self._spelled: dict[int, bytes] = {}  # existing tokens only, so no larger than the vocabulary

    def _leading_token(self, folder: Path) -> int | None:
        """The token that `add_bos_token` puts before a text, as transformers does outside tokenizer.json."""
        if not read_optional_json(folder / CONFIG).get("add_bos_token"):
            return None
        return named_token(folder, "bos_token", self.inner)

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Token ids of a text. Special tokens written in it become these tokens. Other threads can run meanwhile.

        most: stop encoding a long text after this many tokens

        Raises:
            EngineError: the tokenizer cannot encode the text.
            TooLong: encoding stopped before the end of the text.
        """
        ids: list[int] = list(self._before) if add_special_tokens else []
        try:
            for part in encode(self.inner, text):
                if most is not None and len(ids) > most:
                    raise TooLong(f"the text has more than {len(ids)} tokens; the context is {most}, answer included")
                ids += part
        except TokenizerError as error:
            raise EngineError(str(error)) from None
        if add_special_tokens:
            ids += self._after
            if self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
                ids.insert(0, self.bos_token_id)
        return ids

    def least_tokens(self, text: str) -> int:
        """A lower bound on a text's tokens, without encoding it: its length over that of the longest token."""
        return len(text) // self._longest

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token (a character each in the vocabulary). No text has more characters than bytes."""
        spelled = max(map(len, self.inner.get_vocab(with_added_tokens=False)), default=1)
        return max([spelled, *(len(token.content) for token in self._added.values())])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token (a character may span several tokens). Ids without a token have none."""
        spelled = self._spelled.get(token)
        if spelled is None:
            spelled = self._spell(token)
            if spelled:
                self._spelled[token] = spelled
        return spelled

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token].content).encode()
        spelled = self.inner.id_to_token(token)
        if spelled is None:
            return b""
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in spelled):
            return bytes(alphabet[character] for character in spelled)
        return str(spelled).encode()

    def ordinary_encoder(self) -> Callable[[str], list[int]]:
        """A function that encodes text into ordinary tokens only: added tokens written in it stay text. Not cached."""
        described = json.loads(self.inner.to_str())
        described["added_tokens"] = []
        ordinary = tokenizers.Tokenizer.from_str(json.dumps(described))
        return lambda text: [token for part in encode(ordinary, text) for token in part]


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte for each character of a byte-level vocabulary (GPT-2's): printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TextStream:
    """Decodes tokens as they come, holding back incomplete characters and text that may start a stop string.

    With spans, stop strings count only in the answer.
    reasoning_tokens: tokens up to the end of the reasoning, its marks included
    """

    __slots__ = (
        "_bytes",
        "_held",
        "_include_stop",
        "_ready",
        "_skipped",
        "_spell",
        "_stop",
        "_tracker",
        "_undecided",
        "reasoning_tokens",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        skip_special: bool,
        include_stop: bool,
        spans: Spans | None = None,
    ):
        self._spell = tokenizer.token_bytes
        self._stop = tuple(stop)
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._include_stop = include_stop
        self._bytes = b""  # not yet decoded
        self._ready = ""  # decoded text that no stop string can affect
        self._held = ""  # decoded text after that, not returned yet
        self._tracker = SpanTracker(spans) if spans else None
        self._undecided = 0  # tokens that are reasoning if `<think>` follows
        self.reasoning_tokens = 0

    def add(self, token: int, match_stop: bool = True) -> str | None:
        """Add a token. Returns the stop string that it completes, if any; that ends the text."""
        part = self._tracker.part if self._tracker else "answer"
        stop = None if token in self._skipped else self._add(self._spell(token), match_stop)
        if part == "begin" and self._tracker:
            self._undecided += 1
            if self._tracker.part == "reasoning":
                self.reasoning_tokens += self._undecided
        self.reasoning_tokens += part == "reasoning"
        return stop

    def _add(self, spelled: bytes, match_stop: bool) -> str | None:
        self._bytes += spelled
        if not self._stop and not self._tracker:
            return None
        text = self._decode(final=False)
        for part, piece in self._tracker.feed(text) if self._tracker else [("answer", text)]:
            if part == "answer" and self._stop:
                stop = self._match(piece, match_stop)
                if stop is not None:
                    return stop
            else:
                self._ready += self._held + piece
                self._held = ""
        return None

    def _match(self, text: str, match_stop: bool) -> str | None:
        """Add text of the answer; return the stop string that it completes."""
        searched = len(self._held)
        self._held += text
        if not match_stop:
            return None
        found = []
        for stop in self._stop:
            place = self._held.find(stop, max(0, searched - len(stop) + 1))
            if place >= 0:
                found.append((place, -len(stop), stop))
        if not found:
            return None
        place, _, stop = min(found)  # the first, or the longest if several start there
        self._held = self._held[: place + (len(stop) if self._include_stop else 0)]
        self._bytes, self._stop = b"", ()
        return stop

    def take(self, final: bool) -> str:
        """The text that can be returned now; all of it if `final`."""
        ready, self._ready = self._ready, ""
        if final:
            undecided = self._tracker.rest() if self._tracker else ""
            text, self._held = self._held + undecided + self._decode(final), ""
            return ready + text
        text = self._held + ("" if self._tracker else self._decode(final))
        given = len(text) - (self._possible_stop(text) if self._stop else 0)
        self._held = text[given:]
        return ready + text[:given]

    def _decode(self, final: bool) -> str:
        """Decode the complete characters; bytes of an incomplete one stay unless `final`."""
        text, used = codecs.utf_8_decode(self._bytes, "replace", final)
        self._bytes = self._bytes[used:]
        return text

    def _possible_stop(self, text: str) -> int:
        """Length of the longest tail that is the start of a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
