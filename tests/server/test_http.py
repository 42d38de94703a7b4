"""What stands between the endpoints and the network: errors, keys, limits, leaving clients, figures."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from leanseek.engine import Tokenizer
from leanseek.server import app as app_module
from leanseek.server import service as service_module
from leanseek.server.app import MAX_BODY, Access, create_app
from leanseek.server.errors import ServerError
from leanseek.server.run import make_service
from leanseek.server.schema import MOST_TOKENS
from tests.server.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline, "it did not happen within 5 s"
        time.sleep(0.01)


def error(answer: httpx.Response) -> dict[str, Any]:
    """The error, in OpenAI's shape."""
    assert set(answer.json()) == {"error"}
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and isinstance(body["message"], str)
    return body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 99999999999999999999}',
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": ' + b'{"a":' * 5000,
    ],
    ids=lambda body: body[:60].decode(errors="replace") or "empty",
)
def test_a_body_that_is_not_a_request_is_refused(shared: Any, body: bytes) -> None:
    answer = shared().http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert error(answer)["type"] == "invalid_request_error"


def test_routing_and_media_errors_have_the_shape_too(serve: Any) -> None:
    http = serve().http
    assert error(http.get("/nowhere")) and http.get("/nowhere").status_code == 404
    wrong = http.get(CHAT)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and error(wrong)
    form = http.post(CHAT, data={"messages": "x"})
    assert form.status_code == 415 and error(form), "a form could be sent by another site's page"
    assert http.get("/page/../app.py").status_code == 404


def test_a_huge_body_is_refused_without_reading_it(serve: Any) -> None:
    served = serve()
    headers = {"content-type": "application/json"}
    told = served.http.post(CHAT, content=b" " * (MAX_BODY + 1), headers=headers)
    assert told.status_code == 413 and error(told)

    def pieces() -> Any:  # chunked: no length is told
        for _ in range(MAX_BODY // 2**20 + 2):
            yield b" " * 2**20

    assert served.http.post(CHAT, content=pieces(), headers=headers).status_code == 413


def test_the_model_by_name(serve: Any) -> None:
    served = serve("v3.1")
    answer = served.chat(model="gpt-4")
    assert answer.status_code == 404 and error(answer)["code"] == "model_not_found"
    assert [model.id for model in served.openai.models.list()] == ["test-model"]
    model = served.http.get("/v1/models/test-model").json()
    assert (model["object"], model["max_model_len"], model["thinking_switch"]) == ("model", 512, True)
    assert served.http.get("/v1/models/other").status_code == 404


def test_an_api_key_guards_the_api_and_not_the_health(serve: Any) -> None:
    served = serve("v3", Access(api_key="sésame"))
    wrong = [{}, {"authorization": "Bearer nope"}, {"authorization": b"Bearer \xff"}, {"authorization": "s"}]
    for headers in wrong:
        for path in (CHAT, "/tokenize", "/v1/completions"):
            answer = served.http.post(path, json={}, headers=headers)
            assert answer.status_code == 401 and error(answer)["type"] == "authentication_error"
        assert served.http.get("/v1/models", headers=headers).status_code == 401
    good = {"authorization": "Bearer sésame".encode()}
    assert served.http.get("/v1/models", headers=good).status_code == 200
    for path in ("/health", "/metrics", "/"):
        assert served.http.get(path).status_code == 200


HOSTS = ["x/?", "x#", "u@b/page/", "x/health", "x?", "a b", "x:99999999", "[::1", "é", "x\\y"]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("path", ["/v1/models", "/tokenize"])
def test_a_host_is_no_way_past_the_key(shared: Any, host: str, path: str) -> None:
    served = shared("v3", Access(api_key="k"))
    answer = served.http.get(path, headers={"host": host.encode()})
    assert answer.status_code == 400 and "Host" in error(answer)["message"]


@functools.cache
def gated(engine: FakeEngine) -> ASGIApp:
    return create_app(make_service(engine, "test-model"), Access(api_key="k"))


@pytest.mark.parametrize("host", [host.encode("latin-1") for host in HOSTS] + [b"x"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/../v1/models", "/tokenize"])
def test_the_gate_judges_the_path_that_is_served(shared: Any, host: bytes, path: str) -> None:
    """By itself: whatever a Starlette makes of the Host, and were a malformed one let through."""
    served = shared("v3", Access(api_key="k"))
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": b"/health",
        "query_string": b"",
        "scheme": "http",
    }
    scope |= {"headers": [(b"host", host)], "server": ("x", 80), "root_path": "", "http_version": "1.1"}
    app = gated(served.engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "_HOST", re.compile(".*", re.DOTALL))
        asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models",
        "/v1/models/",
        "//v1/models",
        "/V1/models",
        "/v1//models",
        "/v1%2Fmodels",
        "/%76%31/models",
        "/page/../v1/models",
        "/page/%2e%2e/v1/models",
        "/health/../v1/models",
        "http://x/v1/models",
        "http://x/page/../v1/models",
        "/v1/models?x=/page/",
        "/v1/models;/page/",
        "/.//v1/models",
        "/tokenize/",
    ],
)
def test_no_spelling_of_a_path_passes_the_key(shared: Any, target: str) -> None:
    served = shared("v3", Access(api_key="k", root_path="/llm"))
    for prefix in ("", "/llm", "/llm/llm"):
        request = f"GET {target if target.startswith('http') else prefix + target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(request.encode())
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert int(answer.split()[1]) in (401, 404), answer
        assert b"test-model" not in answer


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_of_a_key_has_no_case(shared: Any, scheme: str) -> None:
    served = shared("v3", Access(api_key="k"))
    assert served.http.get("/v1/models", headers={"authorization": f"{scheme} k"}).status_code == 200
    assert served.http.get("/v1/models", headers={"authorization": f"{scheme}k"}).status_code == 401
    assert served.http.get("/v1/models", headers={"authorization": "Basic k"}).status_code == 401


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_behind_a_proxy_that_takes_its_prefix_off_or_not(serve: Any, prefix: str) -> None:
    served = serve("v3", Access(root_path="/llm/"))
    page = served.http.get(f"{prefix}/")
    assert page.status_code == 200
    addresses = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert addresses and not [address for address in addresses if address.startswith("/")], "they are relative"
    for address in addresses:
        assert served.http.get(f"{prefix}/{address}").status_code == 200
    for script in ("chat.js", "stream.js"):
        source = served.http.get(f"{prefix}/page/{script}").text
        assert not re.findall(r"""["'`]/(v1|health|page)""", source)
    assert served.http.get(f"{prefix}/v1/models").status_code == 200
    assert served.http.get("/llmx/v1/models").status_code == 404
    assert served.http.get("/openapi.json").json()["servers"] == [{"url": "/llm"}]
    for wrong in ("llm", "/a b", "http://x", "/a?"):
        with pytest.raises(ServerError, match="root path"):
            Access(root_path=wrong)


def test_the_list_of_models_with_a_slash_behind(serve: Any) -> None:
    http = serve().http
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()


@pytest.mark.parametrize("path", ["/detokenize", "/v1/completions"])
@pytest.mark.parametrize("token", [300, 10**6, 2**31 - 1, 2**40, -1])
def test_ids_beyond_the_vocabulary_are_refused(shared: Any, path: str, token: int) -> None:
    served = shared()
    before = len(served.engine.tokenizer._spelled)
    answer = served.http.post(path, json={"tokens": [5, token], "prompt": [5, token]})
    assert answer.status_code == 400 and error(answer)["message"]
    assert len(served.engine.tokenizer._spelled) == before


def test_an_empty_key_is_no_key() -> None:
    with pytest.raises(ServerError, match="empty"):
        Access(api_key="")


def test_other_sites_are_shut_out_unless_named(serve: Any) -> None:
    asking = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in serve("v3").http.options(CHAT, headers=asking).headers
    served = serve("v3", Access(api_key="k", allowed_origins=["https://a.example"]))
    private = served.http.options(CHAT, headers=asking | {"access-control-request-private-network": "true"})
    assert private.status_code == 200 and private.headers["access-control-allow-private-network"] == "true"
    foreign = asking | {"access-control-request-private-network": "true", "origin": "https://b.example"}
    assert served.http.options(CHAT, headers=foreign).status_code == 400
    assert served.http.options(CHAT, headers=asking).headers["access-control-allow-origin"] == "https://a.example"
    refused = served.http.post(CHAT, json={}, headers={"origin": "https://a.example"})
    assert refused.headers["access-control-allow-origin"] == "https://a.example", "errors can be read there"


def test_a_full_queue_is_told_with_a_time_to_come_back(serve: Any) -> None:
    served = serve()
    served.engine.max_queue = 1
    full = served.http.post("/v1/completions", json={"prompt": ["a", "b"]})
    assert full.status_code == 429 and full.headers["retry-after"] == "3"
    assert error(full)["type"] == "rate_limit_error"
    assert not served.engine.open, "the prompts that fitted were taken back"


def test_more_prompts_than_are_ever_taken_are_not_told_to_come_back(serve: Any) -> None:
    served = serve()
    served.engine.capacity = 1
    refused = served.http.post("/v1/completions", json={"prompt": ["a", "b"]})
    assert refused.status_code == 400 and "2 prompts" in error(refused)["message"]
    assert not served.engine.open


def test_an_engine_that_stops_is_unavailable(serve: Any) -> None:
    served = serve()
    served.engine.stopped = True
    answer = served.chat()
    assert answer.status_code == 503 and answer.headers["retry-after"] and error(answer)
    assert served.http.get("/health").status_code == 503
    served.engine.alive = False
    assert served.http.get("/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_is_told_and_others_go_on(serve: Any, stream: bool) -> None:
    served = serve()
    served.engine.failure = "ValueError: a bug"
    with pytest.raises(openai.APIError, match="a bug"):
        list(
            served.openai.chat.completions.create(
                model="test-model", messages=[{"role": "user", "content": "x"}], stream=stream
            )
        )
    served.engine.failure = None
    assert served.chat().status_code == 200


def test_a_bug_of_ours_is_a_500_without_a_traceback(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    served = serve()
    served.engine.reply = None
    answer = served.chat()
    assert answer.status_code == 500 and "NoneType" not in answer.text and error(answer)["type"] == "server_error"
    assert "unexpected error" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_a_client_that_leaves_frees_the_engine(serve: Any, path: str, stream: bool) -> None:
    served = serve()
    served.engine.pause_s = 0.1
    asked: dict[str, Any] = {
        CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
        "/v1/completions": {"prompt": ["Hi", "Ho"]},
        "/v1/responses": {"input": "Hi"},
    }
    body = asked[path] | {"stream": stream, "max_tokens": 100}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=served.url, timeout=0.3) as leaving:
        if stream:
            with leaving.stream("POST", path, json=body) as answer:
                next(answer.iter_raw())
                raise httpx.ReadTimeout("enough")
        leaving.post(path, json=body)
    eventually(lambda: bool(served.engine.seen) and not served.engine.open)
    assert served.engine.aborted == len(served.engine.seen)


def test_metrics_are_prometheus(serve: Any) -> None:
    served = serve()
    served.chat(n=2)
    served.chat(temperature=-1)
    page = served.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    samples = {
        (sample.name, sample.labels.get("status") or sample.labels.get("position")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples["leanseek:generation_tokens_total", None] == 7
    assert samples["leanseek:kv_cache_usage_perc", None] == 0
    assert samples["leanseek:time_to_first_token_seconds_count", None] == 2
    assert samples["leanseek:time_to_first_token_seconds_sum", None] == pytest.approx(0.04)
    assert samples["leanseek:time_per_output_token_seconds_count", None] == 2
    assert samples["leanseek:http_responses_total", "200"] >= 1
    assert samples["leanseek:http_responses_total", "400"] == 1
    assert samples["leanseek:spec_decode_num_accepted_tokens_per_pos_total", "0"] == 8
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "request_success",
        "prompt_tokens",
        "prefix_cache_hits",
    ):
        assert f"leanseek:{name}" in families


def test_tokens_and_back(serve: Any) -> None:
    http = serve("v3").http
    answer = http.post("/tokenize", json={"prompt": "aé"}).json()
    assert (answer["count"], answer["max_model_len"]) == (4, 512), "BOS, one byte, two bytes"
    assert http.post("/detokenize", json={"tokens": answer["tokens"][1:]}).json() == {"prompt": "aé"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert chat["count"] == 4
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400


def test_curl_streams(serve: Any) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    served = serve()
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True})
    out = subprocess.run(
        [curl, "-sN", f"{served.url}{CHAT}", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    events = [line.removeprefix("data: ") for line in out.splitlines() if line]
    assert events.pop() == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)
    assert text == served.engine.reply


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_split(
    serve: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Splitting 8 MB into tokens takes seconds of a processor."""
    served = serve()
    text = "a " * 2**22
    split = []
    monkeypatch.setattr(Tokenizer, "encode", lambda self, *args: split.append(args))
    body = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    refused = served.http.post(path, json=body)
    assert refused.status_code == 400 and error(refused)["code"] == "context_length_exceeded"
    assert not split


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_texts_are_counted_beyond_the_context_up_to_a_bound(
    serve: Any, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    served = serve("v3")

    def tokenize(text: str) -> httpx.Response:
        value = text if field == "prompt" else [{"role": "user", "content": text}]
        return served.http.post("/tokenize", json={field: value})

    monkeypatch.setattr(service_module, "MOST_TOKENS", 300_000)
    assert tokenize("a " * 75_000).json()["count"] >= 150_000
    for text in ("a " * 160_000, "a " * 2**22):  # too long as seen amid it, and before
        refused = tokenize(text)
        assert refused.status_code == 400 and error(refused)["code"] == "context_length_exceeded"
        assert error(refused)["message"].endswith("tokens; at most 300000 are returned")


@pytest.mark.parametrize(("path", "field"), [("/detokenize", "tokens"), ("/v1/completions", "prompt")])
def test_more_ids_than_any_context_are_refused(serve: Any, path: str, field: str) -> None:
    body = json.dumps({field: [5] * (MOST_TOKENS + 1)})
    refused = serve("v3").http.post(path, content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 400 and f"at most {MOST_TOKENS}" in error(refused)["message"]


def test_nobody_waits_behind_long_texts(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve("v3")
    encode, entered, go = Tokenizer.encode, threading.Semaphore(0), threading.Event()

    def slow(self: Tokenizer, text: str, *rest: Any, **named: Any) -> list[int]:
        if len(text) > 1000:
            entered.release()
            go.wait()
        return encode(self, text[:100], *rest, **named)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    with ThreadPoolExecutor(40) as pool:
        long = [pool.submit(served.http.post, "/tokenize", json={"prompt": "a " * 2**17}) for _ in range(40)]
        try:
            entered.acquire()
            assert served.chat().status_code == 200 and not any(each.done() for each in long)
            assert served.http.post("/detokenize", json={"tokens": [5]}).status_code == 200
        finally:
            go.set()
        assert all(each.result().status_code == 200 for each in long)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 100}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_an_event_is_one_line_to_every_reader(serve: Any, path: str, fields: dict[str, Any]) -> None:
    """Python's `splitlines` and JavaScript take U+2028, U+2029 and U+0085 for line ends."""
    served = serve("v3")
    served.engine.reply = "a\u2028b\u2029c\x85d\u000be\x1cf"
    answer = served.http.post(path, json=fields | {"stream": True})
    events = [line.partition(": ") for line in answer.content.decode().splitlines() if line]
    assert {name for name, *_ in events} <= {"event", "data"}
    bodies = [json.loads(data) for name, _, data in events if name == "data" and data != "[DONE]"]
    assert served.engine.reply in "".join(find_texts(bodies))


def find_texts(value: Any) -> list[str]:
    """What deltas and choices say, wherever it stands."""
    if isinstance(value, list):
        return [text for each in value for text in find_texts(each)]
    if not isinstance(value, dict):
        return []
    own = [each for name, each in value.items() if name in ("content", "text", "delta") and isinstance(each, str)]
    return own + [text for each in value.values() for text in find_texts(each)]
