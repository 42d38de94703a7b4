"""Where it runs: other locales, terminals, threads and Pythons. Each works, or says in a line why not."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest

from leanseek import cli
from leanseek.bench import load
from leanseek.cli import app, doctor, info, terminal
from leanseek.data.prepare import prepare
from leanseek.errors import InputError
from leanseek.native.library import openmp_path
from leanseek.server.errors import MAX_MESSAGE, ApiError
from leanseek.training.loop import _Signals

PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII wherever no encoding is named
TINY = """name = "laufen"
[model]
vocab_size = 300
hidden_size = 16
intermediate_size = 16
moe_intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
n_routed_experts = 0
n_shared_experts = 0
num_experts_per_tok = 0
n_group = 1
topk_group = 1
first_k_dense_replace = 1
num_nextn_predict_layers = 0
[data]
path = "out"
seq_len = 16
fim_rate = 0.0
[train]
steps = 1
batch_size = 2
device = "cpu"
dtype = "float32"
[schedule]
warmup_steps = 0
"""
# one process for all: importing torch is what takes long
COMMANDS = """
import sys
from leanseek.cli import app, terminal
from leanseek.engine import Engine
terminal.prepare()
Engine.__init__.__kwdefaults__["cache_gib"] = 0.01
for line in sys.argv[1:]:
    print("$", line)
    try:
        app(line.split("|"), standalone_mode=False)
    except SystemExit:
        pass
"""


def test_what_is_written_in_an_ascii_locale_is_read_again(tmp_path: Path) -> None:
    """Named and filled with other letters, then used in this process's locale."""
    texts = [f"der König {i} sprach: 皇帝 über alles {i}" for i in range(40)]
    (tmp_path / "wörter.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "run.toml").write_text(TINY, encoding="utf-8")
    commands = [
        "data|prepare|wörter.txt|--out|out|--train-tokenizer|300|--validation-fraction|0.2|--workers|1",
        "data|verify|out",
        "train|run.toml",
        "info|run.toml",
        "generate|runs/laufen|König 皇|--max-tokens|4|--temperature|0",
        "generate|runs/laufen|König 皇|--max-tokens|4|--temperature|0|--json",
        "export|runs/laufen|aus|--format|hf",
    ]
    command = [sys.executable, "-c", COMMANDS, *commands]
    environment = os.environ | PLAIN | {"MPLBACKEND": "module://of_a_notebook.inline", "XDG_CACHE_HOME": str(tmp_path)}
    environment["MPLCONFIGDIR"] = str(Path.home() / ".cache/matplotlib")  # a list of fonts that takes seconds to make
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode("ascii").splitlines()
    output = json.loads(next(line for line in said if line.startswith("{")))
    assert (tmp_path / "runs" / "laufen" / "report.html").is_file()
    before = (tmp_path / "out" / "settings.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        prepare([Path("wörter.txt")], Path("out"), train_vocab=300, validation_fraction=0.2, workers=1)
        assert (tmp_path / "out" / "settings.json").read_bytes() == before
    from leanseek import LLM, SamplingParams

    again = (
        LLM(tmp_path / "aus", cache_gib=0.01)
        .generate("König 皇", SamplingParams(max_tokens=4, temperature=0))[0]
        .outputs[0]
    )
    assert again.token_ids == output["token_ids"]


@pytest.mark.parametrize("name", [b"w\xf6rter", "皇帝".encode("gb18030")])
def test_text_whose_name_is_not_utf_8_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    text, out = Path(os.fsdecode(name) + ".txt"), Path(os.fsdecode(name))
    text.write_text("a b c\n\nd e f", encoding="utf-8")
    first, second = (prepare([text], out, train_vocab=270, workers=1) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("override", ["data.path=\udcf6", "name=l\udce4ufe", "model.attention=\udcff"])
def test_a_setting_that_is_no_text_is_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "run.toml").write_text(TINY, encoding="utf-8")
    with pytest.raises(InputError, match="not UTF-8"):
        app(["train", str(tmp_path / "run.toml"), override], standalone_mode=False)


@pytest.mark.parametrize("text", ["König", "", "皇帝", "a\nb"])
def test_an_argument_that_the_locale_cannot_hold_is_utf8(text: str) -> None:
    assert terminal.given_text(text.encode().decode("ascii", "surrogateescape")) == text
    assert terminal.given_text(text) == text


@pytest.mark.parametrize("text", [b"\xff", b"K\xf6nig", b"\xed\xa0\x80"])
def test_an_argument_that_is_no_text_is_refused(text: bytes) -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        terminal.given_text(text.decode("ascii", "surrogateescape"))


def test_a_name_that_the_locale_cannot_write_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise UnicodeEncodeError(sys.getfilesystemencoding(), "runs/läufe", 6, 7, "ordinal not in range")

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "cannot write the name 'runs/läufe'; set PYTHONUTF8=1" in capsys.readouterr().err


# ---- names and models' words are data ----


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "over\rwritten", "\b\b\b", "\x7f"])
def test_a_models_words_move_nothing_in_a_terminal(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert terminal.shown(f"a\n\t{text}") == f"a\n\t{text}"  # a file or a pipe gets what was written
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shown = terminal.shown(f"a\n\t{text}é皇")
    assert shown.startswith("a\n\t") and shown.endswith("é皇")
    assert shown[3:].isprintable()


@pytest.mark.parametrize(
    "text", ["\x1b]0;owned\x07", "\x9b31m", "over\rwritten", "one\nWARNING:forged", "\u2028", "\udcff"]
)
def test_a_log_entry_moves_nothing_and_forges_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """In the message, in what it quotes, and in an exception's traceback."""
    monkeypatch.setattr(logging.lastResort, "formatter", None)
    terminal.prepare()
    entry = {"name": "leanseek.server", "levelno": logging.ERROR, "levelname": "ERROR"}
    try:
        raise ValueError(text)
    except ValueError as error:
        given = {"msg": "failed: %s", "args": (text,), "exc_info": (ValueError, error, error.__traceback__)}
        logging.lastResort.handle(logging.makeLogRecord(entry | given))
    first, *further = capsys.readouterr().err.splitlines()
    assert first.startswith("failed: ") and len(further) >= 4
    assert all(line.startswith("    ") for line in further)
    assert all(line.isprintable() for line in (first, *further))


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "\x9b31m", "over\rwritten", "one\ntwo"])
def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(warnings, "formatwarning", None)
    terminal.prepare()
    line = warnings.formatwarning(UserWarning(text), UserWarning, "file.py", 1, "source")
    assert line.startswith("leanseek: ") and line.count("\n") == 1 and line[:-1].isprintable()


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "\x9b31m", "over\rwritten", "one\ntwo"])
def test_doctor_spells_the_names_of_tensors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(doctor, "examine_weights", lambda *_: {"tensors": 2, "nonfinite": {name: 3}})
    with pytest.raises(InputError):
        doctor.doctor("model")
    said = capsys.readouterr().out
    assert said.endswith(": 3 values are NaN or infinity\n") and said[:-1].isprintable()


@pytest.mark.parametrize("message", ["\x1b[31mred", "one\ntwo", "x" * 10**7, "[/red]", "\udcff"])
def test_an_error_is_one_short_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str], message: str) -> None:
    terminal.report(InputError(message))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 1100 and said[:-1].isprintable()
    told = ApiError(400, message).body["error"]["message"]
    assert len(told) <= MAX_MESSAGE and told.isprintable()


@pytest.mark.parametrize("name", ["[/red].toml", "[bold]x[/bold].toml", "[link=file:///]a.toml"])
def test_markup_in_a_path_is_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = tmp_path / name.replace("/", "\N{FRACTION SLASH}")
    path.write_text(TINY, encoding="utf-8")
    info.info(str(path))
    folder = tmp_path / "[" / "red]"  # with a real slash: the path reads `[/red]`
    folder.parent.mkdir()
    folder.write_text(TINY, encoding="utf-8")
    folder.rename(folder.with_suffix(".toml"))
    info.info(str(folder.with_suffix(".toml")))
    assert "parameters" in capsys.readouterr().out


# ---- processes and Pythons ----


@pytest.mark.parametrize(
    "path",
    [
        "/usr/lib/libgomp.so.1",
        "/home/me/my env/lib/libgomp-a34b3233.so.1",
        "/opt/a  b/c d/libiomp5.so",
        "/opt/li bomp/libomp.so",
    ],
)
def test_the_openmp_library_is_found_where_its_path_has_blanks(path: str) -> None:
    line = "7f00-7f01 r-xp 00000000 08:01 1234                       "
    maps = f"{line}/usr/lib/libc.so.6\n{line}\n{line}{path}\n{line}/lib/libz.so\n7f05-7f06 rw-p 00000000 00:00 0 \n"
    assert openmp_path(maps) == path
    assert openmp_path(maps.replace("omp", "nil")) is None


def test_a_run_in_a_thread_leaves_signals_alone() -> None:
    before, failed = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        try:
            with _Signals() as signals:
                assert not signals.received
                assert signal.getsignal(signal.SIGINT) is before
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_load_that_is_over_at_once_has_figures(count: int) -> None:
    assert load._quantiles([0.1] * count)["probes"] == count
    assert load._memory([2**20] * count).get("peak_bytes") == (2**20 if count else None)


def test_chat_needs_no_readline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "readline", None)
    with pytest.raises(InputError, match="nowhere"):
        app(["chat", "/nowhere"], standalone_mode=False)


@pytest.mark.parametrize("command", ["train", "prepare", "export"])
def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """As a read-only file system answers, to root as well."""
    (tmp_path / "text.txt").write_text("a b c\n\nd e f", encoding="utf-8")
    prepare([tmp_path / "text.txt"], tmp_path / "out", train_vocab=270, workers=1)
    (tmp_path / "run.toml").write_text(TINY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    arguments = {
        "train": ["train", "run.toml"],
        "prepare": ["data", "prepare", "text.txt", "--out", "new", "--train-tokenizer", "270"],
        "export": ["export", "runs/x", "aus"],
    }[command]
    if command == "export":
        app(["train", "run.toml", "--name", "x", "data.seq_len=2", "train.batch_size=1"], standalone_mode=False)

    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(InputError, match="Read-only file system"):
        app(arguments, standalone_mode=False)


@pytest.mark.parametrize(
    "arguments", [["data", "fetch", "shakespeare", "--out", "new"], ["bench", "serve", "--preset", "bench-30m"]]
)
def test_a_cache_or_a_corpus_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(InputError, match=r"cannot be written.*Read-only file system"):
        app(arguments, standalone_mode=False)


def test_text_is_prepared_without_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("a b c\n\nd e f", encoding="utf-8")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    prepare([tmp_path / "text.txt"], tmp_path / "out", train_vocab=270, workers=1)
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith((".", "tmp")) and p.name != ".lock"]


def test_a_missing_temporary_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    monkeypatch.setattr(cli, "app", tempfile.gettempdir)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "set TMPDIR" in capsys.readouterr().err
    monkeypatch.setattr(cli, "app", Path("/nowhere/x").read_bytes)
    with pytest.raises(FileNotFoundError):  # a failure of ours
        cli.main()


@pytest.mark.parametrize("gib", [1, 3])
def test_doctor_tells_the_memory_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: int
) -> None:
    from leanseek.cli import doctor
    from leanseek.machine import memory

    (tmp_path / "memory.max").write_text(str(gib << 30), encoding="ascii")
    monkeypatch.setattr(memory, "groups", lambda _: [tmp_path])
    assert doctor.examine()["memory_bytes"] == gib << 30
