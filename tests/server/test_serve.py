"""`leanseek serve` as a process: it says where it is, drains when told to stop, and names what is wrong in one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from leanseek.cli import main
from leanseek.errors import InputError
from leanseek.server.app import Access
from leanseek.server.run import serve

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "leanseek", "serve", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


pytestmark = pytest.mark.timeout(90)  # a server that says nothing would be waited for


@pytest.fixture
def process(model_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server at work, and its URL."""
    options = ["--port", "0", "--cache-gib", "0.002", "--served-model-name", "tiny"]
    server = subprocess.Popen(
        command(str(model_folder), *options), stderr=subprocess.PIPE, text=True, env=environment(), cwd="/"
    )
    assert server.stderr
    said = server.stderr.readline()
    match = re.search(r"leanseek: tiny at (http://127\.0\.0\.1:\d+)", said)
    assert match, said + server.stderr.read()
    yield server, match[1]
    server.kill()
    server.communicate()


def stream(url: str, lines: list[str], begun: threading.Event) -> None:
    body = {"prompt": "x", "max_tokens": 600, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            begun.set()


def test_sigterm_finishes_what_runs_and_exits_with_0(process: tuple[subprocess.Popen[str], str]) -> None:
    server, url = process
    lines: list[str] = []
    begun = threading.Event()
    client = threading.Thread(target=stream, args=(url, lines, begun))
    client.start()
    assert begun.wait(30)
    assert httpx.get(f"{url}/health").json()["running"] == 1
    server.send_signal(signal.SIGTERM)
    # no newcomers: refused, or where one stood before the closing door, reset or left without an answer
    with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
        while True:
            httpx.get(f"{url}/health", headers={"connection": "close"})
    client.join()
    assert lines[-2] == "data: [DONE]"
    assert json.loads(lines[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.wait(10) == 0
    assert server.stderr and server.stderr.read() == ""


def test_a_second_signal_ends_it_at_once(process: tuple[subprocess.Popen[str], str]) -> None:
    server, url = process
    begun = threading.Event()

    def quietly() -> None:
        with contextlib.suppress(httpx.HTTPError):
            stream(url, [], begun)

    client = threading.Thread(target=quietly)
    client.start()
    assert begun.wait(30)
    server.send_signal(signal.SIGTERM)
    threading.Event().wait(0.05)
    server.send_signal(signal.SIGTERM)
    assert server.wait(2) == -signal.SIGTERM
    client.join()


def test_a_folder_that_is_no_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["leanseek", "serve", str(tmp_path), "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    out, said = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert re.fullmatch(rf"leanseek: .*{re.escape(str(tmp_path))}.*\n", said), said


def test_a_port_in_use_is_one_line(model_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port} \(Address already in use\)"):
            serve(model_folder, "127.0.0.1", port, None, Access())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chat_template.jinja": "{% for %}"}, "chat template"),
        ({"tokenizer.json": None}, "tokenizer.json"),
        ({}, "max_model_len"),
    ],
)
def test_a_model_that_cannot_be_served_is_one_line(
    model_folder: Path, tmp_path: Path, change: dict[str, str | None], says: str
) -> None:
    """In this process: loading torch again takes seconds."""
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    for name, text in change.items():
        (tmp_path / name).unlink(missing_ok=True)
        if text is not None:
            (tmp_path / name).write_text(text)
    options: dict[str, Any] = {} if change else {"max_model_len": 10**6}
    with pytest.raises(InputError, match=says) as error:
        serve(tmp_path, "127.0.0.1", 0, None, Access(), cache_gib=0.002, **options)
    assert "\n" not in str(error.value)
