"""Structured output with llguidance: which tokens may come next."""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import NoReturn

import llguidance
import numpy as np

from leanseek.engine import guide_worker
from leanseek.engine.confined import Confined, Overtaxed
from leanseek.engine.params import EngineError, Guide
from leanseek.engine.tokenizer import Tokenizer
from leanseek.reading import shorten

log = logging.getLogger(__name__)

MAX_GUIDE = 65_536  # characters; compile time grows up to quadratically
COMPILE_S = 3.0
KEPT_GRAMMARS = 32  # compiled grammars to keep, for requests that share a schema
KEPT_CHARACTERS = 4 * MAX_GUIDE  # total length of their sources, which bounds their memory

# llguidance's messages about a guide, and our message to the client, with shortened parts of the guide. All its other
# messages are about its own state; the client then reads "it cannot be compiled".
_REASONS = [
    (re.compile(pattern, re.DOTALL), reason)
    for pattern, reason in (
        (r"regex parse error:.*\nerror: ([^\n]+)", "not a valid regular expression: {}"),
        (r"lookarounds not supported", "not a valid regular expression: ^, $ and \\b inside it are not supported"),
        (r"Invalid type: (.+?)(?:\n|$)", "there is no type {}"),
        (r"Unknown format: (.+?)(?:\n|$)", "the format {} is not supported"),
        (r"Pointer '(.+?)' does not exist", "a $ref points to {}, which does not exist"),
        (r"Resource '(.+?)' is not present", "{} is outside the schema; references must stay within it"),
        (r"Invalid URI (?:reference )?'(.+?)'", "{} is not an address"),
        (r"Unimplemented keys: \[([^\n]+)\]", "not supported in a schema: {}"),
        (r"oneOf constraints are not supported", "oneOf is supported if its schemas exclude each other; use anyOf"),
        (r"min/maxProperties only", "minProperties and maxProperties are supported if all properties are required"),
        (r"Unsatisfiable schema: ([^\n]+)", "no output fits it: {}"),
        (r"Expected positive integer for '(\w+)'", "{} must be a whole number of at least 0"),
        (r"Expected f64 for '(\w+)'", "{} must be a number"),
        (r"Expected (\w+) for '(\w+)' item", "{1} must hold values of type {0}"),
        (r"Expected (\w+) for '(\w+)'", "{1} must be of type {0}"),
        (r"range (?:start|end) must|invalid range order", "a range goes from one character or number to a higher one"),
        (r"schema must be an object", "a schema must be an object or a boolean"),
        (r"(\$?\w+ must be an? [\w ]+)", "{}"),
        (r"type must be", "type must be a string or a list of strings"),
        (r"(?:regex for (?:integer|float) range|too many digits)", "a bound or multipleOf has too many digits"),
        (r"invalid multiple of", "multipleOf must be above 0"),
        (r"Expecting object schema", "a schema must be an object"),
        (r"NoExtension", "no output fits it"),
        (r'unknown name: "(.+?)"', "there is no rule {}"),
        (r'unknown special token: "?(.+?)"?;', "there is no token {}"),
        (r"Token range end too large: (\d+)", "token {} is not in the vocabulary"),
        (r"(?:invalid token range|invalid digit found)", "token ids are written like <[5]> or <[5-9]>"),
        (r'duplicate rule: "(.+?)"', "there are two rules {}"),
        (r'circular reference in token "(.+?)"', "the token {} refers to itself"),
        (r"(?:Empty grammar|no start rule)", 'it has no rule "start"'),
        (r"unknown grammar (\S+)", "there is no grammar {}"),
        (r"Unknown common regex: (\S+?);", "there is nothing named {} to import"),
        (r"Unknown attribute: (\w+)", "there is no attribute {}"),
        (r"& is only supported", "& joins tokens (whose names are in capitals), not rules"),
        (r"(?:lexer error\n|Expected (?:token|value)|expecting rule|failed to parse \"%)", "the syntax is wrong here"),
        (r" at line \d+ column \d+", "the schema is not JSON"),
    )
]
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")  # line and column in the grammar


class GuideFailed(EngineError):
    """A compiled guide cannot be followed to its end: it takes too much work."""


class Matcher:
    """The position of one choice in its grammar."""

    def __init__(self, inner: llguidance.LLMatcher, vocab_size: int):
        self._inner = inner
        self._vocab_size = vocab_size

    def copy(self) -> Matcher:
        return Matcher(self._inner.deep_copy(), self._vocab_size)

    @property
    def finished(self) -> bool:
        """Whether only the end of the output can follow."""
        return bool(self._inner.is_stopped())

    def advance(self, token: int) -> None:
        """Advance by the chosen token.

        Raises:
            GuideFailed: the token does not fit, or the guide takes too much work from here on.
        """
        if not self._inner.consume_token(token):
            self._fail()

    def masks(self, drafts: Sequence[int]) -> list[np.ndarray]:
        """Allowed tokens (bits of int32 words) now and after each draft, up to the first draft not allowed.

        Raises:
            GuideFailed: the guide takes too much work from here on.
        """
        masks = [self._mask()]
        for draft in drafts:
            if self.finished or not self._inner.try_consume_tokens([draft]):
                break
            if self.finished:
                self._inner.rollback(1)
                break
            masks.append(self._mask())
        if len(masks) > 1:
            self._inner.rollback(len(masks) - 1)
        return masks

    def _mask(self) -> np.ndarray:
        mask = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._inner.is_error():
            self._fail()
        return mask

    def _fail(self) -> NoReturn:
        """Log llguidance's message, which is about its own state, and raise one for the client."""
        log.warning("a form cannot be followed: %s", shorten(self._inner.get_error(), 200))
        raise GuideFailed("the output's form takes too much work to follow; make it simpler")


class Grammars:
    """Compiles guides for one vocabulary. Use it in any thread but the engine's: compiling may take seconds."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = [token for token in eos_token_ids if token < vocab_size]
        self._special = [token for token in tokenizer.added_ids if token < vocab_size]
        self._first_use = threading.Lock()
        self._lock = threading.Lock()  # guards the next two; held only briefly
        self._compiled: OrderedDict[Guide, Matcher] = OrderedDict()
        self._compiling: dict[Guide, Future[Matcher]] = {}

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:  # lazy: takes seconds for 129 K tokens
        tokens = [self._tokenizer.token_bytes(token) for token in range(self._vocab_size)]
        return guide_worker.make_vocabulary(tokens, self._special, self._eos, self._tokenizer.ordinary_encoder())

    @cached_property
    def _trial(self) -> Confined:
        special = {token: self._tokenizer.token_bytes(token).decode() for token in self._special}
        opening = {"size": self._vocab_size, "special": special, "eos": self._eos}
        return Confined(guide_worker.__file__, opening, COMPILE_S)

    def compile(self, guide: Guide) -> Matcher:
        """A matcher at the guide's start. It is shared: copy it before advancing it.

        Raises:
            EngineError: the guide is invalid, or takes too much time or memory to compile.
            Crowded: too many slow guides are being compiled.
        """
        with self._lock:
            if guide in self._compiled:
                self._compiled.move_to_end(guide)
                return self._compiled[guide]
            compiling = self._compiling.get(guide)
            if compiling is None:
                own = self._compiling[guide] = Future()
        if compiling is not None:
            return compiling.result()
        try:
            matcher = self._compile(guide)
        except BaseException as error:
            own.set_exception(error)
            raise
        else:
            own.set_result(matcher)
            self._keep(guide, matcher)
            return matcher
        finally:
            with self._lock:
                del self._compiling[guide]

    def _keep(self, guide: Guide, matcher: Matcher) -> None:
        with self._lock:
            self._compiled[guide] = matcher
            while len(self._compiled) > KEPT_GRAMMARS or sum(len(g.source) for g in self._compiled) > KEPT_CHARACTERS:
                self._compiled.popitem(last=False)

    def _compile(self, guide: Guide) -> Matcher:
        name = f"guided {guide.kind}"
        if len(guide.source) > MAX_GUIDE:
            raise EngineError(f"{name}: it has {len(guide.source):,} characters; the limit is {MAX_GUIDE:,}")
        if not self._eos:
            raise EngineError(f"{name}: it needs a model with an end token; this one has none")
        with self._first_use:
            trial, vocabulary = self._trial, self._vocabulary
        try:
            answer = trial.ask([guide.kind, guide.source])
        except Overtaxed:
            raise EngineError(f"{name}: it takes more than {COMPILE_S:g} s or too much memory to compile") from None
        try:
            if "error" in answer:
                raise ValueError(answer["error"])
            return Matcher(guide_worker.compile_guide(vocabulary, guide.kind, guide.source), self._vocab_size)
        except ValueError as error:
            raise EngineError(f"{name}: {_reason(guide.kind, str(error))}") from None

    def close(self) -> None:
        """End the trial processes."""
        if "_trial" in self.__dict__:
            self._trial.close()


def _reason(kind: str, message: str) -> str:
    """llguidance's message as one line for the client: about the guide, not about the library."""
    message = message.replace("\r", "\n")
    place = _PLACE.match(message) if kind == "grammar" and "JSON schema" not in message else None
    where = f"line {place[1]}, column {place[2]}: " if place else ""
    for pattern, reason in _REASONS:
        if found := pattern.search(message):
            return where + reason.format(*(shorten(part, 100) for part in found.groups()))
    return where + "it cannot be compiled: it is wrong, or takes too much; make it simpler"
