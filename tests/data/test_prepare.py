"""Preparing survives full disks, kills and hostile folders, divides small corpora, and believes no file it reads back."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from leanseek import cli
from leanseek.data.encode import Encoder
from leanseek.data.loader import TokenDataset
from leanseek.data.prepare import prepare
from leanseek.data.shards import ShardWriter, verify
from leanseek.data.tokenizer import save_tokenizer, train_tokenizer
from leanseek.errors import InputError
from leanseek.tokens import encode
from leanseek.training import RunConfig, train
from leanseek.writing import LOCK, alone

pytestmark = pytest.mark.usefixtures("quick_runs")
SENTENCES = [f"the king {i} shall speak of war {i} and of honour" for i in range(60)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def corpus(folder: Path, texts: list[str], name: str = "a.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / name


def leanseek(*arguments: object, cwd: Path, module: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """`leanseek ...`, or `python -m leanseek ...`."""
    start = [sys.executable, "-m", "leanseek"] if module else [str(Path(sys.executable).parent / "leanseek")]
    return subprocess.run([*start, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, **options)


# ---- small corpora ----


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.05), (2, 0.999), (5, 0.5), (5, 1e-9), (60, 1e-9)])
def test_each_split_has_a_document_where_two_differ(tmp_path: Path, count: int, fraction: float) -> None:
    path = corpus(tmp_path, SENTENCES[:count] * 2)
    done = prepare([path], tmp_path / "out", train_vocab=262, validation_fraction=fraction, workers=1)
    assert sum(done.documents.values()) == 2 * count
    assert min(done.documents.values()) >= 2  # duplicates stay together


def test_a_split_that_has_documents_is_what_it_was(tmp_path: Path) -> None:
    from leanseek.data.prepare import _share, is_validation

    path = corpus(tmp_path, SENTENCES)
    assert any(is_validation(text, 0.2, 0) for text in SENTENCES)
    assert _share([path], 0.2, 0, 1) == 0.2
    assert _share([path], 0.0, 0, 1) == 0.0


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.999])
def test_a_single_document_trains_and_a_run_goes_without_validation(tmp_path: Path, fraction: float) -> None:
    path = corpus(tmp_path, [" ".join(SENTENCES)])
    done = prepare([path], tmp_path / "out", train_vocab=262, validation_fraction=fraction, workers=1)
    assert done.documents == {"train": 1, "validation": 0}
    run = run_on(tmp_path / "out", tmp_path)
    assert run.step == 2
    assert run.val_loss is None
    assert "no validation" in (run.folder / "metrics.jsonl").read_text()


def test_a_validation_split_shorter_than_a_window_is_one_window(tmp_path: Path) -> None:
    path = corpus(tmp_path, [" ".join(SENTENCES), "a few words"])
    prepare([path], tmp_path / "out", train_vocab=262, workers=1, seed=next(s for s in range(99) if few_held_out(s)))
    held_out = TokenDataset(tmp_path / "out", "validation", 64, lookahead=2)
    assert held_out.seq_len < 64
    (batch,) = held_out.in_order(4)
    assert batch.tokens.shape == (1, held_out.seq_len + 2)
    run = run_on(tmp_path / "out", tmp_path, "data.seq_len=64", "model.num_nextn_predict_layers=1")
    assert run.val_bits_per_byte is not None
    size = int(held_out.token_bytes[batch.tokens[:, 1 : held_out.seq_len + 1]].sum())
    assert run.val_bits_per_byte == pytest.approx(run.val_loss * held_out.seq_len / np.log(2) / size)
    assert f"one window of {held_out.seq_len} tokens" in (run.folder / "metrics.jsonl").read_text()


def few_held_out(seed: int) -> bool:
    from leanseek.data.encode import digest

    return digest("a few words", seed) < digest(" ".join(SENTENCES), seed)


def run_on(shards: Path, runs: Path, *overrides: str) -> Any:
    tiny = """model.hidden_size=32 model.num_hidden_layers=1 model.num_attention_heads=2 model.n_routed_experts=4
    model.num_nextn_predict_layers=0 data.seq_len=16 data.fim_rate=0 train.steps=2 train.batch_size=2 train.device=cpu
    train.dtype=float32 name=run model.vocab_size=262"""
    return train(RunConfig.load("demo", [*tiny.split(), f"data.path={shards}", *overrides]), runs=runs)


# ---- the same command again ----


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_a_changed_input_is_noticed(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "in"
    corpus(folder, SENTENCES[:9])
    corpus(folder, SENTENCES[9:20], "b.jsonl")
    prepare([folder], tmp_path / "out", train_vocab=262, workers=1)
    if change == "edit":  # to the same size
        path = folder / "b.jsonl"
        path.write_text(path.read_text().replace("king", "duke"))
        said = r"b\.jsonl has changed"
    elif change == "add":
        corpus(folder, SENTENCES[:2], "c.jsonl")
        said = r"c\.jsonl was added"
    else:
        (folder / "a.jsonl").unlink()
        said = r"a\.jsonl was removed"
    with pytest.raises(InputError, match=said):
        prepare([folder], tmp_path / "out", train_vocab=262, workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must lie"),
        ({"max_document": 0}, "limit of a document"),
        ({"seed": -1}, "seed must lie"),
    ],
)
def test_options_out_of_range_are_one_line(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare([corpus(tmp_path, SENTENCES)], tmp_path / "out", train_vocab=262, **options)


def test_the_end_of_prepare_is_a_table_and_one_json_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = corpus(tmp_path / "in", SENTENCES).parent
    (folder / "\x1b[31mred.pdf").write_text("")
    (folder / os.fsdecode(b"\xff.pdf")).write_text("")
    command = ["data", "prepare", "in", "--out", "out", "--train-tokenizer", "262", "--workers", "1"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "1 files read, 2 skipped" in done.stdout
    assert r"skipped in/\x1b[31mred.pdf: another kind of file" in done.stdout
    assert "\x1b" not in done.stdout
    again = json.loads(CliRunner().invoke(cli.app, [*command, "--json"]).stdout)
    assert (again["files"], sum(again["documents"].values())) == (1, 60)
    assert {row["why"] for row in again["skipped"]} == {"another kind of file"}
    assert sum(again["bytes"].values()) == sum(len(text.encode()) for text in SENTENCES)


# ---- where it runs ----


@pytest.mark.parametrize("module", [False, True], ids=["script", "module"])
def test_python_files_in_the_folder_are_not_run(tmp_path: Path, module: bool) -> None:
    corpus(tmp_path, SENTENCES)
    for name in ("struct.py", "multiprocessing/__init__.py", "numpy.py", "leanseek.py", "tokenizers.py", "json.py"):
        if module and name in ("leanseek.py", "json.py"):
            continue  # python -m finds the package, and starts, with the folder on its path
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import os; open('run', 'w'); os._exit(9)")
    done = leanseek("data", "prepare", "a.jsonl", "--out", "out", "--train-tokenizer", 262, cwd=tmp_path, module=module)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_script_without_a_main_guard_prepares(tmp_path: Path) -> None:
    corpus(tmp_path, SENTENCES)
    (tmp_path / "script.py").write_text(
        "from pathlib import Path\nfrom leanseek.data.prepare import prepare\n"
        "print(sum(prepare([Path('a.jsonl')], Path('out'), train_vocab=262, workers=2).documents.values()))\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "60\n"), done.stderr


def started(tmp_path: Path, stopped: Callable[[int], None]) -> tuple[int | None, list[str]]:
    """A preparation with two workers, in a fork, to which `stopped` happens at its first document: exit code, lines.

    It waits there: most of the text is yet to be encoded.
    """

    def run() -> None:
        os.setsid()
        os.chdir(tmp_path)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of the background
        sys.stderr = open("said", "w", encoding="utf-8")  # noqa: SIM115
        sys.argv = ["leanseek", "data", "prepare", "a.jsonl", "--out", "out", "--workers", "2"]
        sys.argv += ["--train-tokenizer", "262"]
        add = ShardWriter.add

        def held(*arguments: Any) -> None:
            Path("reached").touch()
            while not Path("go").exists():
                time.sleep(0.001)
            add(*arguments)

        ShardWriter.add = held  # type: ignore[method-assign]
        cli.main()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    while not (tmp_path / "reached").exists():
        assert child.is_alive()
        time.sleep(0.002)
    assert child.pid is not None
    stopped(child.pid)
    (tmp_path / "go").touch()
    child.join(60)
    return child.exitcode, [line for line in (tmp_path / "said").read_text().splitlines() if line]


def kill_a_worker(pid: int) -> None:
    psutil.Process(pid).children()[0].kill()


def press_ctrl_c(pid: int) -> None:
    os.killpg(pid, signal.SIGINT)


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [(kill_a_worker, 1, "an encoding process was killed by signal 9"), (press_ctrl_c, 130, "stopped; out keeps")],
)
def test_what_is_stopped_says_a_line_and_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: Callable[[int], None],
    code: int,
    said: str,
) -> None:
    corpus(tmp_path, [f"{i} {text} " * 20 for i in range(3) for text in SENTENCES])
    monkeypatch.setattr("leanseek.data.prepare._BATCH_CHARACTERS", 1 << 14)
    monkeypatch.chdir(tmp_path)
    found, lines = started(tmp_path, stop)
    assert found == code, lines
    assert len(lines) == 1, lines
    assert said in lines[0]
    done = prepare([Path("a.jsonl")], Path("out"), train_vocab=262, workers=2)
    assert sum(done.documents.values()) == 180


@pytest.mark.parametrize("out", ["file", "file/out", "/proc/shards", "/dev/null"])
def test_an_output_that_cannot_be_is_one_line(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written") as caught:
        prepare([corpus(tmp_path, SENTENCES)], tmp_path / out, train_vocab=262, workers=1)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of a file stands for the disk."""
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path, [text * 40 for text in SENTENCES])
    command = ["data", "prepare", "a.jsonl", "--out", "out", "--train-tokenizer", "262", "--workers", "1"]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = leanseek(*command, cwd=tmp_path, preexec_fn=limit)
    lines = [line for line in done.stderr.splitlines() if "━" not in line and line]
    assert (done.returncode, len(lines)) == (1, 1), done.stderr
    assert "out cannot be written" in lines[0]
    assert prepare([Path("a.jsonl")], Path("out"), train_vocab=262, workers=1).files == 1


@pytest.mark.parametrize(("wrong", "given"), [('{"text": 5}\n', False), ('{"text": "a"', True), ("\xff", False)])
def test_before_its_first_shard_a_folder_takes_a_mended_input(tmp_path: Path, wrong: str, given: bool) -> None:
    options: dict[str, Any] = {"train_vocab": 262}
    if given:
        (tmp_path / "given").mkdir()
        save_tokenizer(train_tokenizer(SENTENCES, 270), tmp_path / "given")
        (tmp_path / "given/generation_config.json").write_text('{"eos_token_id": [1, 5]}')
        (tmp_path / "given/chat_template.jinja").write_text("{{ messages }}")
        options = {"tokenizer": tmp_path / "given"}
    (tmp_path / "b.jsonl").write_text(wrong, encoding="latin-1")
    files = [corpus(tmp_path, SENTENCES), tmp_path / "b.jsonl"]
    with pytest.raises(InputError, match=r"b\.jsonl"):
        prepare(files, tmp_path / "out", **options, workers=1)
    (tmp_path / "b.jsonl").write_text('{"text": "mended"}\n')
    prepare(files, tmp_path / "out", train_vocab=264, workers=1)  # and another tokenizer, too
    prepare(files, tmp_path / "anew", train_vocab=264, workers=1)
    found, anew = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("[!.]*")} for n in ("out", "anew"))
    assert found == anew


@pytest.mark.parametrize("there", ["tokenizer.json", "model.safetensors", "notes", "a.jsonl"])
def test_a_folder_of_other_files_is_left_alone(tmp_path: Path, there: str) -> None:
    path = corpus(tmp_path, SENTENCES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).write_text("precious")
    with pytest.raises(InputError, match=f"holds {there}, which data prepare did not write"):
        prepare([path], tmp_path / "out", train_vocab=262, workers=1)
    assert [p.read_text() for p in (tmp_path / "out").glob("[!.]*")] == ["precious"]


def test_two_that_prepare_the_same_folder_do_not_meet(tmp_path: Path) -> None:
    path = corpus(tmp_path, SENTENCES)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with alone(tmp_path / "out" / LOCK, InputError("taken")):
        for out in ("out", "link"):
            with pytest.raises(InputError, match="is being prepared by another process"):
                prepare([path], tmp_path / out, train_vocab=262, workers=1)
    assert prepare([path], tmp_path / "link", train_vocab=262, workers=1).files == 1


# ---- long documents ----


@pytest.mark.parametrize("kind", ["own", "gpt2"])
def test_a_long_document_has_the_tokens_it_has_in_one_piece(tmp_path: Path, kind: str) -> None:
    import tokenizers

    rng = np.random.default_rng(0)
    words = ["war", "  ", "\n\n", "naïve", "皇帝", "1234", "\t", "...", " king", "\n", "-----"]
    text = "".join(rng.choice(words, 80_000)) + "x" * 150_001 + " " * 140_003 + "=" * 100_001 + "end"
    tokenizer = train_tokenizer([text[:50_000]], 400)
    if kind == "gpt2":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    save_tokenizer(tokenizer, tmp_path)
    encoder = Encoder(tmp_path)
    assert len(list(encode(tokenizer, text))) > 2
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder(text).tolist() == [*whole, 1]


# ---- what is read back ----


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and beside it its shards."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare([corpus(folder, SENTENCES)], folder / "out", train_vocab=262, validation_fraction=0.2, workers=1)
    return folder


@pytest.fixture
def shards(prepared: Path, tmp_path: Path) -> Path:
    """A copy of them to spoil."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def opened(folder: Path) -> int:
    return len(TokenDataset(folder, "train", 16)) + len(TokenDataset(folder, "validation", 16))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("shards.0.dtype", "O"),
        ("shards.0.dtype", "<u2"),
        ("shards.0.dtype", "int64"),
        ("shards.0.dtype", None),
        ("shards.0.train", None),
        ("shards.0.train.tokens", -1),
        ("shards.0.train.tokens", 1.5),
        ("shards.0.train.tokens", "7"),
        ("shards.0.train.tokens", True),
        ("shards.0.train.tokens", 10**30),
        ("shards.0.train.documents", 3),
        ("shards.0.train.documents", 0),
        ("shards.0.train.crc32", 5),
        ("shards.0.next", [0]),
        ("shards", {}),
        ("shards", [7]),
        ("files", {"../../etc/passwd": 1}),
        ("files", []),
    ],
)
def test_a_mangled_manifest_is_one_line(shards: Path, place: str, value: object) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    *path, last = place.split(".")
    at: Any = manifest
    for key in path:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[last] = value
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError) as caught:
        opened(shards)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", "[" * 100_000, '{"shards": NaN}', '{"shards": 1' + "0" * 5000]
)
@pytest.mark.parametrize("name", ["manifest.json", "settings.json"])
def test_a_broken_file_of_the_folder_is_one_line(shards: Path, name: str, content: str) -> None:
    (shards / name).write_text(content)
    with pytest.raises(InputError, match=r"\.json is corrupt|was prepared by another version"):
        opened(shards)
        prepare([shards.parent / "a.jsonl"], shards, train_vocab=262, validation_fraction=0.2)


@pytest.mark.parametrize(
    "content",
    [np.zeros(3, object), np.zeros((2, 2), np.uint16), np.zeros(0, np.uint16), np.zeros(9, np.float32), b"", b"PK"],
)
def test_a_broken_table_of_bytes_is_one_line(shards: Path, content: Any) -> None:
    manifest = json.loads((shards / "manifest.json").read_text()) | {"files": {}}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    path = shards / "token_bytes.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(InputError, match=r"token_bytes\.npy is missing or corrupt"):
        opened(shards)


def replace(shards: Path, name: str, change: Callable[[np.ndarray], None], dtype: str) -> None:
    """Another array in a shard's file, its checksum in the manifest."""
    import zlib

    array = np.fromfile(shards / name, dtype)
    change(array)
    array.tofile(shards / name)
    manifest = json.loads((shards / "manifest.json").read_text())
    kind = "crc32" if name.endswith("bin") else "ends_crc32"
    manifest["shards"][0]["train"][kind] = zlib.crc32(array.tobytes())
    (shards / "manifest.json").write_text(json.dumps(manifest))


def put(place: int, value: int) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(place, value)


@pytest.mark.parametrize(
    ("name", "change", "dtype", "message"),
    [
        ("00000.train.ends", put(3, 0), "int64", "ends is corrupt"),
        ("00000.train.ends", put(0, -5), "int64", "ends is corrupt"),
        ("00000.train.ends", put(-1, 10**9), "int64", "ends is corrupt"),
        ("00000.train.ends", put(2, 10**9), "int64", "ends is corrupt"),
        ("00000.train.ends", put(-1, 1), "int64", "ends is corrupt"),
        ("00000.train.bin", put(40, 262), "uint16", "holds id 262, the tokenizer beside it has 262"),
        ("00000.train.bin", put(-1, 65_535), "uint16", "holds id 65535"),
    ],
)
def test_ends_and_ids_that_cannot_be_are_refused(
    shards: Path, name: str, change: Callable[[np.ndarray], None], dtype: str, message: str
) -> None:
    replace(shards, name, change, dtype)
    for _ in range(2):  # with and without a stamp
        with pytest.raises(InputError, match=message):
            opened(shards)


# ---- checksums once ----


@pytest.fixture
def read_whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shard files that were read as a whole."""
    from leanseek.data import shards

    names: list[str] = []
    inner = shards._checked

    def checked(array: np.ndarray, crc: int, path: Path, mask: int) -> int:
        names.append(path.name)
        return inner(array, crc, path, mask)

    monkeypatch.setattr(shards, "_checked", checked)
    return names


def test_a_shard_is_read_whole_once_and_again_when_it_changed(shards: Path, read_whole: list[str]) -> None:
    opened(shards)
    assert len(read_whole) == 4
    opened(shards)
    assert len(read_whole) == 4
    assert sum(verify(shards).documents.values()) == 60
    assert len(read_whole) == 8
    path, before = shards / "00000.train.bin", (shards / "00000.train.bin").stat()
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of change cannot be set
    with pytest.raises(InputError, match=r"00000\.train\.bin is corrupt \(checksum\)"):
        opened(shards)


@pytest.mark.parametrize("content", ["[]", "{", '{"00000.train.bin": []}', '{"00000.train.bin": ["a"]}'])
def test_a_broken_stamp_is_no_stamp(shards: Path, read_whole: list[str], content: str) -> None:
    opened(shards)
    (stamp,) = (shards.parent / "cache" / "leanseek" / "shards").iterdir()
    stamp.write_text(content)
    opened(shards)
    assert read_whole.count("00000.train.bin") == 2


def test_without_a_cache_folder_everything_is_checked_every_time(
    shards: Path, read_whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "manifest.json"))
    opened(shards)
    opened(shards)
    assert len(read_whole) == 8


def test_verify_reads_everything_on_the_command_line(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards.parent)
    done = CliRunner().invoke(cli.app, ["data", "verify", "out", "--json"])
    assert json.loads(done.stdout)["out"] == "out"
    raw = bytearray((shards / "00000.validation.ends").read_bytes())
    raw[0] ^= 1
    (shards / "00000.validation.ends").write_bytes(raw)
    done = CliRunner().invoke(cli.app, ["data", "verify", "out"])
    assert isinstance(done.exception, InputError) and "00000.validation.ends is corrupt" in str(done.exception)
