"""Compiles guides. As a script it compiles on trial: a guide that takes too long or breaks llguidance ends its process.

It imports nothing from leanseek, so the process starts fast.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance

MEMORY_BYTES = 1 << 30
STACK_BYTES = 4 << 20  # half that of the server's threads, so what fits here fits there
# All requests wait while a guide computes its step, so its work is bounded, and so is its memory.
LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "verbose_errors": False}
# A guide that is too large to follow mostly fails in its first steps: outputs to try, steps of each, seconds in all.
TRIED, TRIED_STEPS, TRIED_S = 4, 64, 0.5
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\r\t]{1,40}"}  # room to indent, but no endless blanks by weak models


class _Tokens:
    """The tokenizer interface of llguidance."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], eos: int, encode: Callable[[str], Sequence[int]]
    ):
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos
        self._encode = encode

    def __call__(self, text: str) -> Sequence[int]:
        return self._encode(text)


def make_vocabulary(
    tokens: Sequence[bytes], special: Sequence[int], eos: Sequence[int], encode: Callable[[str], Sequence[int]]
) -> llguidance.LLTokenizer:
    """A vocabulary whose special tokens never match the text that spells them; a Lark grammar can name them.

    Args:
        tokens: the bytes of each id
        special: ids of special tokens
        eos: ids that end an output, at least one
        encode: turns a text into ids, none of them special
    """
    wrapper = llguidance.TokenizerWrapper(_Tokens(tokens, special, eos[0], encode))
    return llguidance.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=list(eos))


def compile_guide(vocabulary: llguidance.LLTokenizer, kind: str, source: str) -> llguidance.LLMatcher:
    """A matcher at the start of a guide. Its first mask is computed here, and its copies share it.

    Raises:
        ValueError: the guide is invalid, or takes too much work.
    """
    make = llguidance.LLMatcher
    if kind == "json_schema":
        grammar = make.grammar_from_json_schema(source, overrides=JSON_OPTIONS)
    else:
        grammar = (make.grammar_from_regex if kind == "regex" else make.grammar_from_lark)(source)
    matcher = make(vocabulary, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def _bytes_vocabulary(
    size: int, special: Mapping[str, str], eos: Sequence[int]
) -> tuple[llguidance.LLTokenizer, list[int]]:
    """A vocabulary of single bytes, at the first free ids, and of the special tokens; also returns the bytes' ids."""
    named = {int(token): text.encode() for token, text in special.items()}
    free = [token for token in range(size + 256) if token not in named and token not in eos][:256]
    size = max(size, free[-1] + 1)
    tokens = [named.get(token, b"") for token in range(size)]
    for byte, token in enumerate(free):
        tokens[token] = bytes([byte])
    return make_vocabulary(tokens, sorted(named), eos, lambda text: [free[byte] for byte in text.encode()]), free


def _try(compiled: llguidance.LLMatcher, ids: Sequence[int]) -> None:
    """Write the starts of some outputs: random bytes that the guide allows.

    Raises:
        ValueError: a step takes too much work.
    """
    end = time.monotonic() + TRIED_S
    for seed in range(TRIED):
        _follow(compiled.deep_copy(), ids, random.Random(seed), end)


def _follow(matcher: llguidance.LLMatcher, ids: Sequence[int], chance: random.Random, end: float) -> None:
    closing = {ids[byte] for byte in b'"]}'}  # preferred, to get past the first string of JSON
    for _ in range(TRIED_STEPS):
        mask = matcher.compute_bitmask()
        allowed = [token for token in ids if mask[token >> 3] >> (token & 7) & 1]
        if matcher.is_error() or matcher.is_stopped() or not allowed or time.monotonic() > end:
            break
        preferred = [token for token in allowed if token in closing]
        if not matcher.consume_token(chance.choice(preferred if preferred and chance.random() < 0.5 else allowed)):
            break
    if matcher.is_error():
        raise ValueError(matcher.get_error())


def _main() -> None:
    """Lines of JSON: first the vocabulary in and {} out; then (kind, source) in and {} or {"error"} out, repeatedly."""
    vocabulary, ids = _bytes_vocabulary(**json.loads(sys.stdin.readline()))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("{}", flush=True)
    for line in sys.stdin:
        try:
            _try(compile_guide(vocabulary, *json.loads(line)), ids)
            answer = {}
        except Exception as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=_main)
    worker.start()
    worker.join()
