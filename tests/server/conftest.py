"""A server on a real socket over the fake engine, with tokenizers that have the tokens of each family."""

from __future__ import annotations

import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import tokenizers

import leanseek
from leanseek import ModelConfig, Transformer
from leanseek.engine import AsyncEngine, Tokenizer
from leanseek.server.app import Access, create_app
from leanseek.server.connections import Limits, Server
from leanseek.server.run import make_service
from tests.server.fake_engine import FakeEngine
from tests.small import NETWORK, byte_tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEPSEEK = ["<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"]
DEEPSEEK += ["<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"]
TOKENS = {
    "plain": ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
    "v3": DEEPSEEK,
    "r1": [*DEEPSEEK, "<think>", "</think>"],
    "v3.1": [*DEEPSEEK, "<think>", "</think>", "<｜search▁begin｜>"],
    "kimi": ["<|im_middle|>", "<|im_user|>", "<|im_end|>", "<|tool_call_begin|>"],
}


def write_tokenizer(folder: Path, family: str) -> Tokenizer:
    """A byte-level tokenizer with a vocabulary of bytes and the family's tokens."""
    inner = byte_tokenizer([BOS, EOS])
    inner.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in TOKENS[family]])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def write_model(folder: Path, family: str = "v3.1") -> Path:
    """A Hugging Face folder of a random network, small enough to answer in milliseconds."""
    size = {"vocab_size": 258 + len(TOKENS[family]), "max_position_embeddings": 1024, "q_lora_rank": 24}
    config = ModelConfig(**NETWORK | size, initializer_range=0.3)
    leanseek.save(Transformer(config).init_weights(0), folder)
    write_tokenizer(folder, family)
    return folder


@contextmanager
def running(
    engine: FakeEngine | AsyncEngine, access: Access | None = None, limits: Limits | None = None
) -> Iterator[str]:
    """The base URL of a server over the engine."""
    service = make_service(engine, "test-model")
    server = Server(create_app(service, access), service, limits or Limits())
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.001)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join()
        service.close()


class Served:
    """An engine, and a client of the server over it."""

    def __init__(self, engine: FakeEngine | AsyncEngine, url: str):
        self.engine = engine
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=30, verify=False)  # certificates take long to read
        self.openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, http_client=self.http
        )

    def chat(self, **fields: object) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "Hi"}]} | fields
        return self.http.post("/v1/chat/completions", json=body)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path, request: pytest.FixtureRequest) -> Serve:
    """serve(family, access=None, max_model_len=512, limits=None, template=None): starts a server that lasts for the
    test."""

    def start(
        family: str = "v3",
        access: Access | None = None,
        max_model_len: int = 512,
        limits: Limits | None = None,
        template: str | None = None,
    ) -> Served:
        engine = FakeEngine(write_tokenizer(tmp_path / family, family), max_model_len)
        if template is not None:
            (tmp_path / family / "chat_template.jinja").write_text(template)
        context = running(engine, access, limits)
        url = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        served = Served(engine, url)
        request.addfinalizer(served.http.close)
        return served

    return start


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with ExitStack() as stack:

        @functools.cache
        def start(family: str, access: Access | None, max_model_len: int) -> Served:
            engine = FakeEngine(write_tokenizer(tmp_path_factory.mktemp(family), family), max_model_len)
            served = Served(engine, stack.enter_context(running(engine, access)))
            stack.callback(served.http.close)
            return served

        yield start


@pytest.fixture
def shared(_shared: Serve) -> Serve:
    """shared(family, access=None, max_model_len=512): a server that the module's tests share, its engine as new."""

    def get(family: str = "v3", access: Access | None = None, max_model_len: int = 512) -> Served:
        served = _shared(family, access, max_model_len)
        served.engine.forget()
        return served

    return get


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random V3.1."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny-v3.1")


@contextmanager
def _over(folder: Path, **options: object) -> Iterator[Served]:
    engine = AsyncEngine.load(folder, **options)
    engine.start()
    with running(engine) as url:
        served = Served(engine, url)
        yield served
        served.http.close()
    engine.stop()


@pytest.fixture
def over() -> Callable[..., AbstractContextManager[Served]]:
    """over(folder, **options): a server over the real engine of a model's folder, as long as the context lasts."""
    return _over


@pytest.fixture(scope="module")
def real(model_folder: Path) -> Iterator[Served]:
    """A server over the real engine."""
    with _over(model_folder, cache_gib=0.002, max_batch=8, max_queue=64) as served:
        yield served
