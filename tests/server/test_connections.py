"""Clients that never end, that send what is no request, or that are too many; and a server that is told to stop."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from leanseek.server import connections
from leanseek.server.app import Access, create_app
from leanseek.server.connections import Limits, Server, most_connections
from leanseek.server.run import make_service

pytestmark = pytest.mark.timeout(60)
SHORT = Limits(head_s=0.3, body_s=0.3, taking_s=0.5, keep_alive_s=75, shutdown_s=1.0, connections=100)
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def talk(url: str, sent: bytes, timeout: float = 10) -> bytes:
    """What the server says, until it closes the connection."""
    with closing(connect(url)) as client:
        client.settimeout(timeout)
        client.sendall(sent)
        return heard(client)


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def heard(client: socket.socket) -> bytes:
    said = b""
    while piece := client.recv(65536):
        said += piece
    return said


def status(answer: bytes) -> int:
    head, _, body = answer[answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    assert set(json.loads(body)) == {"error"}, "errors have OpenAI's shape here too"
    return int(head.split()[1])


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHost: x\r\n",
        POST + b"Content-Length: 100\r\n\r\n{",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        POST + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n",
    ],
    ids=["line", "head", "body", "chunk", "100-continue"],
)
def test_a_request_that_never_comes_whole_is_ended(serve: Any, sent: bytes) -> None:
    served = serve(limits=SHORT)
    assert status(talk(served.url, sent)) == 408
    assert served.http.get("/health").status_code == 200


def test_who_says_nothing_is_told_nothing(serve: Any) -> None:
    assert talk(serve(limits=SHORT).url, b"") == b""


def test_a_request_that_comes_in_drops_is_ended_too(serve: Any) -> None:
    """The limit is on the whole of a head or body, not on a pause."""
    with closing(connect(serve(limits=SHORT).url)) as client, pytest.raises(OSError):
        for _ in range(400):
            client.sendall(b"G")
            time.sleep(0.05)


def test_the_rest_of_a_body_that_was_refused_is_not_waited_for(serve: Any) -> None:
    served = serve("v3", Access(api_key="k"), limits=SHORT)
    answer = talk(served.url, POST + b"Content-Length: 100\r\n\r\n{")
    assert status(answer) == 401


def test_a_kept_connection_has_the_limits_anew(serve: Any) -> None:
    """Many quick requests on one connection are no slow request."""
    served = serve(limits=SHORT)
    with closing(connect(served.url)) as client:
        for _ in range(10):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            said = b""
            while not said.endswith(b"}"):
                said += client.recv(65536)
            assert said.startswith(b"HTTP/1.1 200")
            time.sleep(0.1)
        client.sendall(b"GET /hea")
        assert status(heard(client)) == 408


@pytest.mark.parametrize("stream", [False, True])
def test_a_reader_that_takes_nothing_is_ended(serve: Any, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(limits=SHORT, max_model_len=10**6)
    served.engine.reply = "x" * 20_000
    lost = threading.Event()
    connection_lost = connections.Connection.connection_lost

    def noted(self: connections.Connection, error: Exception | None) -> None:
        connection_lost(self, error)
        lost.set()

    monkeypatch.setattr(connections.Connection, "connection_lost", noted)
    if stream:
        body: Any = {"prompt": "x", "max_tokens": 20_000, "logprobs": 5, "stream": True}
    else:  # megabytes in one piece
        body = {"tokens": served.engine.tokenizer.added_ids[-1:] * 500_000}
    written = json.dumps(body).encode()
    with closing(connect(served.url)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = POST if stream else POST.replace(b"/v1/completions", b"/detokenize")
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(written) + written)
        assert lost.wait(40), "it is still waited for"
        while served.engine.open:  # its request ends with it
            time.sleep(0.01)


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        POST + b"Content-Length: -2\r\n\r\n{}",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
    ],
    ids=[
        "length+chunked",
        "chunked+length",
        "two lengths",
        "negative",
        "gzip",
        "chunk",
        "no host",
        "hosts",
        "tls",
    ],
)
def test_what_is_no_request_is_answered_400(serve: Any, sent: bytes) -> None:
    served = serve(limits=SHORT)
    assert status(talk(served.url, sent)) in (400, 501)
    assert served.http.get("/health").status_code == 200


def test_what_is_no_request_behind_an_answer_closes_quietly(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A body that was refused unread may turn out to be no HTTP."""
    served = serve("v3", Access(api_key="k"), limits=SHORT)
    with closing(connect(served.url)) as client:
        client.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        said = b""
        while not said.endswith(b"}}"):
            said += client.recv(65536)
        assert status(said) == 401
        client.sendall(b"zz\r\n")
        assert heard(client) == b""
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    "head",
    [
        POST,  # no key
        POST.replace(b"/v1/completions", b"/nowhere"),
        POST.replace(b"/v1/completions", b"/page/chat.js"),
        POST.replace(b"Host: x", b"Host: x/y"),
        POST.replace(b"application/json", b"text/plain") + b"Authorization: Bearer k\r\n",
    ],
    ids=["key", "path", "method", "host", "type"],
)
def test_what_is_refused_unread_and_is_no_request_is_answered_once(
    serve: Any, caplog: pytest.LogCaptureFixture, head: bytes
) -> None:
    """In one packet: the application answers the head after the body has shown that it is no HTTP."""
    served = serve("v3", Access(api_key="k"), limits=SHORT)
    said = talk(served.url, head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert status(said) == 400
    assert said.count(b"HTTP/1.1") == 1
    assert not caplog.records, "what a client sends is not logged line by line"


def test_connections_have_a_cap_and_half_open_ones_make_room(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    served = serve(limits=dataclasses.replace(Limits(), connections=5))
    crowd = [connect(served.url) for _ in range(40)]
    for client in crowd:
        client.sendall(b"GET /hea")
    try:
        assert httpx.get(f"{served.url}/health").status_code == 200, "who has a whole request is served"
    finally:
        for client in crowd:
            client.close()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1 and "5 connections are open" in said[0], said


def test_where_all_connections_are_at_work_a_newcomer_is_told(serve: Any) -> None:
    served = serve(limits=dataclasses.replace(Limits(), connections=2))
    served.engine.pause_s = 0.2
    written = json.dumps({"prompt": "x", "stream": True}).encode()
    working = [connect(served.url) for _ in range(2)]
    for client in working:
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(written) + written)
        client.recv(1)
    answer = talk(served.url, b"")
    assert status(answer) == 503 and b"retry-after" in answer.lower()
    for client in working:
        client.close()


def test_the_cap_lies_below_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (128, 256, 1024):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        assert 8 <= most_connections() < limit - 16
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert most_connections() > 1000


# ---- stopping ----


@pytest.fixture
def stoppable(serve: Any) -> Iterator[Any]:
    """start(limits) -> (server over a fake engine, its URL, the thread it runs in)."""
    served = serve()  # for its engine and tokenizer
    started: list[tuple[Server, threading.Thread]] = []

    def start(limits: Limits = SHORT) -> tuple[Any, str, threading.Thread, Server]:
        service = make_service(served.engine, "test-model")
        server = Server(create_app(service), service, limits)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.001)
        started.append((server, thread))
        return served.engine, url, thread, server

    yield start
    for server, thread in started:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /hea", POST + b"Content-Length: 100\r\n\r\n{", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /"],
    ids=["nothing", "head", "body", "second head"],
)
def test_half_sent_requests_do_not_keep_the_server(stoppable: Any, sent: bytes) -> None:
    _, url, thread, server = stoppable(dataclasses.replace(Limits(), shutdown_s=20.0))
    with closing(connect(url)) as client:
        client.sendall(sent)
        time.sleep(0.2)
        server.should_exit = True
        thread.join(5)
        assert not thread.is_alive()


def test_who_asks_while_it_stops_is_answered_503(stoppable: Any) -> None:
    engine, url, thread, server = stoppable(dataclasses.replace(Limits(), shutdown_s=20.0))
    engine.pause_s, engine.reply = 0.5, "x" * 60  # 30 s, unless it is hurried
    got: list[httpx.Response] = []
    body = {"prompt": "x", "max_tokens": 60}
    running = threading.Thread(target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60)))
    running.start()
    while not engine.open:
        time.sleep(0.01)
    server.should_exit = True
    while httpx.get(f"{url}/health").status_code == 200:
        time.sleep(0.01)
    for path in ("/v1/completions", "/v1/chat/completions"):
        both = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
        refused = httpx.post(f"{url}{path}", json=both)
        assert refused.status_code == 503 and refused.headers["retry-after"], refused.text
    engine.pause_s = 0.0
    running.join()
    thread.join(5)
    assert not thread.is_alive() and got[0].status_code == 200, "what ran was finished"


@pytest.mark.parametrize("stream", [False, True])
def test_what_still_runs_at_the_end_is_ended_with_an_error(stoppable: Any, stream: bool) -> None:
    engine, url, thread, server = stoppable()
    engine.pause_s, engine.reply = 0.05, "x" * 400  # 20 s
    got: list[httpx.Response] = []
    body = {"prompt": "x", "max_tokens": 400, "stream": stream}
    running = threading.Thread(target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=body)))
    running.start()
    while not engine.open:
        time.sleep(0.01)
    server.should_exit = True
    thread.join(10)
    running.join(10)
    assert not thread.is_alive() and "the server is stopping" in got[0].text
    assert got[0].status_code == (200 if stream else 503)


def test_a_reader_that_takes_nothing_does_not_keep_the_server(stoppable: Any) -> None:
    engine, url, thread, server = stoppable(dataclasses.replace(Limits(), shutdown_s=1.0))
    engine.max_model_len, engine.reply = 10**6, "x" * 20_000
    written = json.dumps({"prompt": "x", "max_tokens": 20_000, "logprobs": 5, "stream": True}).encode()
    with closing(connect(url)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(written) + written)
        client.recv(1)
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def test_no_descriptors_is_one_line(
    caplog: pytest.LogCaptureFixture, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where something else has taken them all, asyncio fails to accept again and again."""
    served = serve()
    failing = iter(range(50))
    accept = socket.socket.accept

    def refuse(self: socket.socket) -> Any:
        if next(failing, None) is not None:
            raise OSError(24, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", refuse)
    assert served.http.get("/health").status_code == 200
    said = [record.getMessage() for record in caplog.records]
    assert said == ["cannot accept connections now (Too many open files)"]
    assert connections.NOTICE_S >= 60, "and not again for a while"


def test_connections_are_kept_longer_than_clients_keep_them() -> None:
    assert Limits().keep_alive_s > 60
