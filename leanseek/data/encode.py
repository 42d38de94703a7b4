"""Documents -> token ids in processes of their own: a text that kills the tokenizer kills one of them.

They are plain subprocesses that talk over pipes, so they need no semaphores and never import the script that called
us; the folder it was called in is not on their path. A frame is its length (8 bytes) and its bytes; of two that belong
together the first is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO, NamedTuple

import numpy as np
from tokenizers import Tokenizer

import leanseek
from leanseek.data.formats import DataError
from leanseek.errors import RunError
from leanseek.reading import shorten
from leanseek.tokens import TokenizerError, encode, open_tokenizer, special_tokens

_CHILD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("leanseek", {init!r})
sys.modules["leanseek"] = module = importlib.util.module_from_spec(spec)
sys.path += [folder for folder in {path!r} if folder not in sys.path]
spec.loader.exec_module(module)
from leanseek.data.encode import serve
serve()
"""


class Encoded(NamedTuple):
    """A document: whether it is held out, its ids with the end token, the UTF-8 bytes of its text."""

    validation: bool
    ids: np.ndarray
    size: int


def digest(text: str, seed: int) -> int:
    """64 bits of a text, which decide its split."""
    raw = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(raw, "little")


def is_validation(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation split: by its content, so that duplicates stay together."""
    return digest(text, seed) < fraction * 2**64


class Encoders:
    """`workers` processes that encode with the tokenizer in `folder`. A context manager: they end with it."""

    def __init__(self, workers: int, folder: Path, fraction: float, seed: int):
        self.settings = json.dumps([str(folder), fraction, seed]).encode()
        self.log = tempfile.TemporaryFile(dir=folder)  # what the processes say; the end of it explains a death  # noqa: SIM115
        self.pool = ThreadPoolExecutor(workers)
        self.idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self.children: list[subprocess.Popen[bytes]] = []
        for _ in range(workers):
            self.children.append(self._start())
            self.idle.put(self.children[-1])

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()  # nothing of theirs is wanted any more; a thread that waits for one sees it end
        self.pool.shutdown(cancel_futures=True)
        for child in self.children:
            child.communicate()
        self.log.close()

    def submit(self, texts: list[str]) -> Future[list[Encoded]]:
        """The encoded texts, in time.

        Raises (the future does):
            DataError: the tokenizer cannot take a text.
            RunError: a process died.
        """
        return self.pool.submit(self._encode, texts)

    def _start(self) -> subprocess.Popen[bytes]:
        here = ("", os.getcwd())
        path = [folder for folder in sys.path if folder not in here]
        code = _CHILD.format(init=str(Path(leanseek.__file__ or "").resolve()), path=path)
        # -P: the current folder, in which a struct.py may lie, is not on its path
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},  # the processes are the parallelism
        )

    def _encode(self, texts: list[str]) -> list[Encoded]:
        child = self.idle.get()
        assert child.stdin and child.stdout
        try:
            _send(child.stdin, self.settings, json.dumps(texts).encode())
            head = json.loads(_receive(child.stdout))
            if isinstance(head, str):
                raise DataError(head)
            ids = np.frombuffer(_receive(child.stdout), np.uint32)
        except (EOFError, BrokenPipeError):
            raise RunError(self._death(child)) from None
        finally:
            self.idle.put(child)
        ends = np.cumsum([length for _, length, _ in head])
        return [Encoded(held, i, size) for (held, _, size), i in zip(head, np.split(ids, ends[:-1]), strict=True)]

    def _death(self, child: subprocess.Popen[bytes]) -> str:
        code = child.wait()
        self.log.seek(0)
        said = (self.log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1][:300]
        how = f"was ended by signal {-code}, perhaps for want of memory" if code < 0 else f"failed: {said}"
        return f"an encoding process {how}; what is done is kept: the same command goes on, with fewer --workers"


def _send(pipe: IO[bytes], *frames: bytes) -> None:
    for frame in frames:
        pipe.write(struct.pack("<Q", len(frame)))
        pipe.write(frame)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    size = pipe.read(8)
    frame = pipe.read(struct.unpack("<Q", size)[0]) if len(size) == 8 else b""
    if len(size) < 8 or len(frame) < struct.unpack("<Q", size)[0]:
        raise EOFError
    return frame


# ---- in the processes ----


def serve() -> None:
    """Answer frames on standard output until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    read, write = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not print into the answers
    encoder: Encoder | None = None
    while True:
        try:
            folder, fraction, seed = json.loads(_receive(read))
            texts = json.loads(_receive(read))
        except EOFError:
            return
        encoder = encoder or Encoder(Path(folder))
        try:
            ids = [encoder(text) for text in texts]
        except DataError as error:
            _send(write, json.dumps(str(error)).encode())
            continue
        head = [
            (is_validation(text, fraction, seed), len(i), len(text.encode()))
            for text, i in zip(texts, ids, strict=True)
        ]
        _send(write, json.dumps(head).encode(), np.concatenate(ids).tobytes())


class Encoder:
    """The tokenizer for raw text, in which the name of a special token is text and never that token."""

    def __init__(self, folder: Path):
        self.tokenizer: Tokenizer = open_tokenizer(folder / "tokenizer.json")
        self.special = special_tokens(self.tokenizer, folder)
        self.tokenizer.encode_special_tokens = True

    def __call__(self, text: str) -> np.ndarray:
        """A document's ids [n] uint32: what the tokenizer puts before a text, the text, the end token.

        Raises:
            DataError: the tokenizer cannot take the text.
        """
        try:
            parts = [np.array(part, np.uint32) for part in encode(self.tokenizer, text)]
        except TokenizerError as error:
            raise DataError(f"{error}: {shorten(text)!r}") from None
        leading, end = np.array(self.special.leading, np.uint32), np.array(self.special.eos[:1], np.uint32)
        return np.concatenate([leading, *parts, end])
