"""Files become shards and shards become batches: nothing lost, nothing shared between splits, nothing random."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from leanseek.data.files import DataError, documents, input_files
from leanseek.data.loader import TokenDataset
from leanseek.data.prepare import is_validation, prepare
from leanseek.data.tokenizer import EOS, FIM, load_tokenizer, token_bytes, train_tokenizer

WORDS = "the king shall speak of honour and of war 1234 , ; ! \n\n 皇帝 naïve über".split(" ")


def sentence(seed: int, words: int = 60) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number in range(6):
        rows = [json.dumps({"text": sentence(number * 100 + i)}) for i in range(40)]
        (folder / f"{number}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    prepare([source], out, train_vocab=320, validation_fraction=0.2, workers=1)
    return out


# ---- files ----


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["first\nline", "zweite Zeile: ä", "第三"]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for path in input_files([tmp_path]):
        assert list(documents(path)) == texts


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_dropped(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} " * 20 + "\n\n" for i in range(600))
    (tmp_path / "book.txt").write_text(text)
    pieces = list(documents(tmp_path / "book.txt"))
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert all(p.endswith("\n\n") for p in pieces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl:2 is not JSON"),
        ("bad.jsonl", b'{"body": "a"}\n', "has no string 'text'"),
        ("bad.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 500, mtime=0)[:-12], "is truncated or cannot be read"),
        ("bad.jsonl.zst", zstandard.compress(bytes(range(256)) * 99)[:-9], "bad.jsonl.zst"),
        ("bad.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("empty.docx", b"", "is not one of .txt"),
    ],
)
def test_broken_input_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        [list(documents(p)) for p in input_files([tmp_path / name])]
    assert "\n" not in str(caught.value)


# ---- tokenizer ----


def test_training_is_deterministic_and_transformers_reads_it(shards: Path) -> None:
    texts = [sentence(i) for i in range(50)]
    assert train_tokenizer(texts, 300).to_str() == train_tokenizer(texts, 300).to_str()
    from transformers import PreTrainedTokenizerFast  # not in the environment of the lowest versions

    theirs = PreTrainedTokenizerFast.from_pretrained(shards)
    assert theirs.eos_token == EOS
    assert theirs(texts[0])["input_ids"] == load_tokenizer(shards).encode(texts[0]).ids


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80))
def test_token_bytes_add_up_to_the_text(text: str) -> None:
    """Exact for any text, so bits per byte is too."""
    tokenizer = _TOKENIZER
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert int(token_bytes(tokenizer)[ids].sum()) == len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


_TOKENIZER = train_tokenizer([sentence(i) for i in range(50)], 320)


# ---- shards ----


def test_no_document_is_in_both_splits_even_when_it_stands_twice(source: Path, shards: Path) -> None:
    tokenizer = load_tokenizer(shards)
    seen: dict[str, set[str]] = {}
    for split in ("train", "validation"):
        data = TokenDataset(shards, split, 16)
        seen[split] = {
            tokenizer.decode(data.shards[data.shard_of[i]][data.starts[i] : data.ends[i] - 1].tolist())
            for i in range(len(data))
        }
    assert not seen["train"] & seen["validation"]
    texts = [t for p in input_files([source]) for t in documents(p)]
    assert seen["train"] | seen["validation"] == set(texts)
    assert all(is_validation(t, 0.2, 0) == (t in seen["validation"]) for t in texts)


def test_an_interrupted_preparation_ends_with_the_same_bytes(source: Path, shards: Path, tmp_path: Path) -> None:
    """kill -9 as soon as one shard is done."""
    out = tmp_path / "out"
    arguments = ["data", "prepare", str(source), "--out", str(out), "--train-tokenizer", "320"]
    command = [sys.executable, "-m", "leanseek", *arguments, "--validation-fraction", "0.2", "--workers", "1"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out / "00000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    import os

    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    subprocess.run(command, check=True, capture_output=True)
    for path in sorted(shards.iterdir()):
        if path.name != "settings.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_other_settings_into_the_same_folder_are_refused(source: Path, shards: Path) -> None:
    assert prepare([source], shards, train_vocab=320, validation_fraction=0.2).tokens["train"] > 0  # the same: no work
    with pytest.raises(DataError, match="another validation_fraction"):
        prepare([source], shards, train_vocab=320, validation_fraction=0.5)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_shard_is_named(source: Path, tmp_path: Path, damage: str) -> None:
    prepare([source], tmp_path, train_vocab=320, workers=1, shard_tokens=2000)
    victim = tmp_path / "00002.train.bin"
    raw = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    else:
        raw[7] ^= 1
        victim.write_bytes(raw if damage == "flip" else raw[:-2])
    with pytest.raises(DataError, match=r"00002\.train\.bin"):
        TokenDataset(tmp_path, "train", 16)


# ---- batches ----


def test_an_epoch_holds_every_token_once(shards: Path) -> None:
    """Windows tile the packed epoch: their inputs, put together, are the documents in some order."""
    data = TokenDataset(shards, "train", 32, lookahead=1, seed=3)
    windows = data.batch(0, data.samples_per_epoch).tokens
    stream = np.concatenate(data.shards)
    got = np.bincount(windows[:, :32].flatten().numpy(), minlength=320)
    missing = np.bincount(stream, minlength=320) - got
    assert missing.min() >= 0
    assert missing.sum() == len(stream) - data.samples_per_epoch * 32 <= 32
    assert (windows[:-1, 32] == windows[1:, 0]).all()  # the target behind a window is the next one's first input


def test_sample_is_a_function_of_seed_and_number(shards: Path) -> None:
    """Resuming anywhere, with any batch size, continues the same stream."""
    whole = TokenDataset(shards, "train", 24, lookahead=2, seed=5, fim_rate=0.5)
    count = whole.samples_per_epoch * 2 + 3
    stream = whole.batch(0, count).tokens
    for start, n in ((0, 1), (7, 5), (whole.samples_per_epoch - 1, 3), (count - 2, 2)):
        fresh = TokenDataset(shards, "train", 24, lookahead=2, seed=5, fim_rate=0.5)
        assert (fresh.batch(start, n).tokens == stream[start : start + n]).all()
    assert (TokenDataset(shards, "train", 24, lookahead=2, seed=6).batch(0, 9).tokens != stream[:9]).any()


def test_fill_in_middle_rearranges_and_loses_nothing(shards: Path) -> None:
    """<begin> prefix <hole> suffix <end> middle <eos>, for about the asked share of the documents."""
    data = TokenDataset(shards, "train", 32, fim_rate=0.3)
    tokenizer = load_tokenizer(shards)
    begin, hole, end = (tokenizer.token_to_id(t) for t in FIM)
    data.batch(0, 1)
    rearranged = data._epoch[3]
    assert 0.15 < rearranged.mean() < 0.45
    for document in np.flatnonzero(rearranged)[:20]:
        tokens = data.shards[data.shard_of[document]][data.starts[document] : data.ends[document]]
        got = data._fill_in_middle(tokens, int(document)).tolist()
        assert got[0] == begin
        assert got[-1] == data.end
        prefix, rest = got[1 : got.index(hole)], got[got.index(hole) + 1 : -1]
        suffix, middle = rest[: rest.index(end)], rest[rest.index(end) + 1 :]
        assert prefix + middle + suffix == tokens[:-1].tolist()


def test_validation_is_read_once_in_order(shards: Path) -> None:
    data = TokenDataset(shards, "validation", 20, lookahead=1)
    rows = np.concatenate([b.tokens.numpy() for b in data.in_order(3)])
    assert len(rows) == data.samples_per_epoch
    assert (rows[:, :20].flatten() == np.concatenate(data.shards)[: rows.shape[0] * 20]).all()
