"""Files as people have them: every one is read, refused in one line, or listed as skipped; none fills the memory."""

from __future__ import annotations

import codecs
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from leanseek.data.files import DataError, find_inputs, read

TEXTS = ["first\nline", "zweite Zeile: ä", "第三"]
ROWS = [{"text": text, "n": [1, {"a": "]"}]} for text in TEXTS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
MIB = 1 << 20


def texts(path: Path, max_document: int = 1) -> list[str]:
    return [text for text, _ in read(path, max_document)]


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("A.TXT", b"one\ntwo\n", ["one\ntwo\n"]),
        ("a.JSONL", LINES, TEXTS),
        ("a.ndjson", b"\n \n" + LINES.strip(), TEXTS),
        ("a.json", json.dumps(ROWS).encode(), TEXTS),
        ("a.json", json.dumps(ROWS, indent=2).encode(), TEXTS),
        ("a.json", json.dumps(ROWS[1], ensure_ascii=False).encode(), TEXTS[1:2]),
        ("a.Json", LINES, TEXTS),
        ("a.json", b" [ ] ", []),
        ("a.json", b"", []),
    ],
)
def test_suffixes_in_any_case_and_packing(
    tmp_path: Path, pack: Callable[[bytes], bytes], name: str, content: bytes, expected: list[str]
) -> None:
    packed = pack(content)
    suffix = {b"\x1f\x8b": ".GZ", b"\x28\xb5": ".zst"}.get(packed[:2], "")
    (tmp_path / (name + suffix)).write_bytes(packed)
    assert [text for path in find_inputs([tmp_path / (name + suffix)]).files for text in texts(path)] == expected


def test_a_long_json_array_is_read_across_chunks(tmp_path: Path) -> None:
    long = [str(i) + "ä" * 300_000 for i in range(9)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in long], ensure_ascii=False))
    assert texts(tmp_path / "a.json") == long


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, name: str) -> None:
    content = b"plain" if name == "a.txt" else b'{"text": "plain"}\n'
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
    assert texts(tmp_path / name) == ["plain"]
    if name == "a.jsonl":  # files put together
        (tmp_path / name).write_bytes((codecs.BOM_UTF8 + content) * 2)
        assert texts(tmp_path / name) == ["plain"] * 2


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "is UTF-16"),
        ("utf-32", "is UTF-32"),
        ("utf-16-le", "many of its bytes are zero"),
        ("utf-32-be", "many of its bytes are zero"),
        ("latin-1", r"is not UTF-8 at byte 11"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, name: str, encoding: str, message: str) -> None:
    (tmp_path / name).write_bytes('{"text": "nä"}'.encode(encoding))
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text"', "row 2 is not JSON"),
        ("a.json", b'[{"text": "a"}', "ends within its array"),
        ("a.json", b'[{"text": "a"}, ["b"]]', "row 2 has no string 'text'"),
        ("a.json", b'{"text": 3}', "row 1 has no string 'text'"),
        ("a.json", b"[" * 200_000, "is not JSON that can be read"),
        ("a.json", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "is not JSON that can be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 200_000, "a.jsonl:2 is not JSON that can be read"),
        ("a.txt", b"a" * (MIB - 1) + b"\xff", f"is not UTF-8 at byte {MIB - 1}"),
        ("a.txt", b"a" * (MIB - 1) + "ä".encode()[:1] + b"\n", f"is not UTF-8 at byte {MIB - 1}"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


# ---- folders ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of everything a bit, and a folder outside that a link leads to."""
    root, outside = tmp_path / "corpus", tmp_path / "outside"
    for path in (root / "sub", root / ".ipynb_checkpoints", root / "out", outside):
        path.mkdir(parents=True)
    for name in ("a.txt", "B.TXT", "sub/c.json", "._a.txt", ".ipynb_checkpoints/a.txt", "notes.pdf", "out/x.txt"):
        (root / name).write_text('{"text": "here"}')
    (root / "tokenizer.json").write_text('{"vocab": {"text": 7}}')
    (outside / "far.txt").write_text("far")
    (root / "linked").symlink_to(outside)
    (root / "link.txt").symlink_to(outside / "far.txt")
    (root / "sub" / "loop").symlink_to(root)
    (root / "gone.txt").symlink_to(outside / "nowhere")
    os.mkfifo(root / "pipe.txt")
    return root


def listed(folder: Path, follow_links: bool) -> tuple[list[str], dict[str, str]]:
    found = find_inputs([folder], follow_links, without=folder / "out")
    named = {str(path.relative_to(folder)): why for path, why in found.skipped}
    return [str(path.relative_to(folder)) for path in found.files], named


def test_what_is_skipped_in_a_folder_is_listed_with_the_cause(folder: Path) -> None:
    files, skipped = listed(folder, follow_links=False)
    assert files == ["B.TXT", "a.txt", "sub/c.json"]
    link = "a link; --follow-links reads it"
    assert skipped == {
        "._a.txt": "hidden",
        ".ipynb_checkpoints": "hidden",
        "notes.pdf": "another kind of file",
        "tokenizer.json": 'a .json without "text" in its first 1 MiB',
        "linked": link,
        "link.txt": link,
        "sub/loop": link,
        "gone.txt": "a broken link",
        "pipe.txt": "not a regular file",
    }


def test_links_are_followed_when_asked_for_and_loops_end(folder: Path) -> None:
    files, skipped = listed(folder, follow_links=True)
    assert files == ["B.TXT", "a.txt", "link.txt", "sub/c.json"]
    assert skipped["sub/loop"] == "a link to a folder that is read already"
    assert skipped["linked/far.txt"] == f"the same file as {folder / 'link.txt'}"


@pytest.mark.parametrize("other", ["a.txt", "sub/../a.txt", "also.txt", "hard.txt"])
def test_a_file_is_read_once_by_whatever_names(folder: Path, other: str) -> None:
    (folder / "also.txt").symlink_to("a.txt")
    (folder / "hard.txt").hardlink_to(folder / "a.txt")
    found = find_inputs([folder / "a.txt", folder / other, folder / "B.TXT"])
    names = ["B.TXT", "a.txt", *(["hard.txt"] if other == "hard.txt" else [])]  # a file of its own, to the system too
    assert [path.name for path in found.files] == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe.txt", "is not a regular file"),
        ("notes.pdf", "is not one of .txt"),
        ("gone.txt", "does not exist"),
        (".ipynb_checkpoints/none", "does not exist"),
    ],
)
def test_what_is_named_and_cannot_be_read_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_inputs([folder / name])


def test_a_device_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is not a regular file"):
        find_inputs([tmp_path / "zero.txt"])
    with pytest.raises(DataError, match="is not a regular file"):
        texts(tmp_path / "zero.txt")


def test_nothing_found_says_what_was_skipped(tmp_path: Path) -> None:
    (tmp_path / ".hidden.txt").write_text("a")
    with pytest.raises(DataError, match=r"files in .*; skipped: .*\.hidden\.txt \(hidden\)$"):
        find_inputs([tmp_path])


# ---- bombs ----


def packed(path: Path, block: bytes, count: int) -> Path:
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(count):
            writer.write(block)
    return path


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("a.jsonl.zst", b"a" * MIB, "has a line with more than 1 MiB"),
        ("a.txt.zst", b"a" * MIB, "has a line with more than 1 MiB"),
        ("a.jsonl.zst", b"\n" * MIB, "more than 1 MiB of blanks"),
        ("a.txt.zst", b" \n" * (MIB // 2), "more than 1 MiB of blanks"),
        ("a.txt.zst", bytes(MIB), "many of its bytes are zero"),
        ("a.json.zst", b'{"text": "' + b"a" * MIB, "row 1 has more than 1 MiB"),
        ("a.json.zst", b" " * MIB, "more than 1 MiB of blanks"),
    ],
)
def test_a_small_archive_cannot_fill_the_memory(tmp_path: Path, name: str, block: bytes, message: str) -> None:
    """100 MiB behind a limit of one: a handful of blocks is read."""
    import tracemalloc

    path = packed(tmp_path / name, block, 100)
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        texts(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * MIB


@pytest.mark.parametrize(
    "rows", [["x" * (2 * MIB)] * 3, ["y"] * 200 + ["x" * (2 * MIB)]], ids=["alone", "among short ones"]
)
def test_a_long_cell_is_refused_and_shorter_ones_are_read(tmp_path: Path, rows: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has .*more than 1 MiB"):
        texts(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", max_document=2) == rows


@pytest.mark.parametrize("name", [b"w\xf6rter", "\u7687\u5e1d".encode("gb18030"), "\u7687".encode()])
def test_a_file_whose_name_is_not_utf_8_is_read(tmp_path: Path, name: bytes) -> None:
    """pyarrow spells a path in UTF-8; in a locale with another encoding every foreign name is like this."""
    path = tmp_path / (os.fsdecode(name) + ".parquet")
    with path.open("wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), file)
    assert texts(path) == ["a", "b"]


def test_below_the_limit_everything_streams(tmp_path: Path) -> None:
    letters = np.frombuffer(b"ab \n", np.uint8)
    rng = np.random.default_rng(0)
    rows = [letters[rng.integers(0, 4, MIB // 2)].tobytes().decode() for _ in range(5)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": row}) for row in rows))
    assert texts(tmp_path / "a.jsonl") == rows
