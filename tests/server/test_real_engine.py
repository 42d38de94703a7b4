"""The server over the engine it is made for, with a small random model."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from leanseek import LLM, SamplingParams
from leanseek.engine import EngineError, Guide

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(real: Any) -> openai.OpenAI:
    return real.openai


def idle(real: Any) -> None:
    """Wait until no request is left; then no page may be held."""
    deadline = time.monotonic() + 10
    while (stats := real.engine.stats()).running or stats.waiting or stats.pages_used:
        assert time.monotonic() < deadline, f"not idle after 10 s: {stats}"
        time.sleep(0.02)


def test_the_server_says_what_the_engine_does(real: Any, client: openai.OpenAI, model_folder: Path) -> None:
    """Greedy text is the same through LLM, whole and streamed."""
    llm = LLM(model_folder, cache_gib=0.002)
    (output,) = llm.generate("To be", SamplingParams(temperature=0, max_tokens=20))
    ask = client.completions.create
    whole = ask(model="test-model", prompt="To be", temperature=0, max_tokens=20)
    assert whole.choices[0].text == output.outputs[0].text
    streamed = ask(model="test-model", prompt="To be", temperature=0, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == output.outputs[0].text


def test_a_prompts_logprobs_are_those_of_generating_it(real: Any, client: openai.OpenAI) -> None:
    """Echo scores a text as generating it did: evaluation harnesses rely on it."""
    ask = client.completions.create
    letters = {"structured_outputs": {"regex": "[a-z]{8}"}}
    made = ask(model="test-model", prompt="To be", max_tokens=20, logprobs=1, seed=2, extra_body=letters).choices[0]
    assert len(made.text) == 8
    scored = ask(model="test-model", prompt="To be" + made.text, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert scored.logprobs.tokens[-8:] == made.logprobs.tokens[:8]
    assert scored.logprobs.token_logprobs[-8:] == pytest.approx(made.logprobs.token_logprobs[:8], abs=1e-3)


# Both compile; the first fails at its first step, the second behind what a trial sees.
@pytest.mark.parametrize("start", ["x{1000000}", "/[b-c]{80}/ x{1000000}"])
def test_a_form_that_cannot_be_followed_is_the_clients_fault(
    real: Any, client: openai.OpenAI, model_folder: Path, start: str
) -> None:
    grammar = f'start: {start}\nx: "a"'
    form = {"structured_outputs": {"grammar": grammar}, "max_tokens": 90}
    chat = {"messages": MESSAGES} | form
    told = []
    for path, body in (
        ("/v1/completions", {"prompt": "To be"} | form),
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"input": "Hi", "structured_outputs": form["structured_outputs"]}),
    ):
        whole = real.http.post(path, json=body)
        assert whole.status_code == 400, whole.text
        told.append(whole.json()["error"])
    streamed = real.http.post("/v1/chat/completions", json=chat | {"stream": True})
    if streamed.status_code == 200:
        *_, last, _ = streamed.text.strip().split("\n\n")
        told.append(json.loads(last.removeprefix("data: "))["error"])
    for error in told:
        assert error["type"] == "invalid_request_error" and error["message"].endswith("make it simpler")
    with pytest.raises(EngineError, match="make it simpler"):
        params = SamplingParams(max_tokens=90, guided=Guide.grammar(grammar))
        LLM(model_folder, cache_gib=0.002).generate("To be", params)
    idle(real)


def test_structured_output_holds_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = client.chat.completions.create(
        model="test-model",
        messages=MESSAGES,
        response_format=form,
        seed=1,
    )
    parsed = json.loads(answer.choices[0].message.content or "")
    assert isinstance(parsed["ok"], bool) and parsed["n"] in (1, 2)


def test_a_forced_call_holds_its_parameters(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("f", "g")]
    stream = client.chat.completions.create(
        model="test-model", messages=MESSAGES, tools=tools, tool_choice="required", stream=True, seed=3
    )
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert calls[0].function.name in ("f", "g")
    assert isinstance(json.loads("".join(call.function.arguments for call in calls))["on"], bool)


@pytest.mark.parametrize("begin", ["{", "<｜tool▁calls▁begin｜>"])
def test_a_form_beside_tools_is_held_either_way(real: Any, client: openai.OpenAI, begin: str) -> None:
    """The random network is led to begin with one or the other."""
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    schema = parameters | {"additionalProperties": False}
    tools: Any = [
        {"type": "function", "function": {"name": "f", "parameters": schema}},
        {"type": "function", "function": {"name": "g"}},
    ]
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    (token,) = real.engine.tokenizer.encode(begin, add_special_tokens=False)
    choice = client.chat.completions.create(
        model="test-model", messages=MESSAGES, tools=tools, response_format=form, seed=1, logit_bias={str(token): 100},
        parallel_tool_calls=False,
    ).choices[0]  # fmt: skip
    if begin == "{":
        assert choice.message.tool_calls is None and json.loads(choice.message.content or "")["on"] in (True, False)
        return
    (call,) = choice.message.tool_calls or []
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "g" else arguments["on"] in (True, False)
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")


def test_many_at_once_a_third_of_whom_leave(real: Any) -> None:
    """Everyone who stays is answered, and no page is lost to those who go."""

    def ask(number: int) -> str:
        body = {"prompt": f"{number} " * 10, "max_tokens": 60, "stream": True, "ignore_eos": True, "seed": number}
        with httpx.stream("POST", f"{real.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            if number % 3 == 0:
                next(lines)
                return "left"
            return "done" if "[DONE]" in [line.removeprefix("data: ") for line in lines][-2:] else "cut"

    with ThreadPoolExecutor(16) as pool:
        ends = list(pool.map(ask, range(36)))
    assert ends.count("done") == 24 and ends.count("left") == 12
    idle(real)
    assert real.engine.stats().finished["abort"] >= 1


def test_a_client_that_leaves_frees_its_pages(real: Any) -> None:
    """Also one that does not stream, and so is never written to before its answer is whole."""
    aborted = real.engine.stats().finished.get("abort", 0)
    host, port = real.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "n": 8}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 10
    while not real.engine.stats().running:
        assert time.monotonic() < deadline, "never ran"
        time.sleep(0.001)
    connection.close()
    idle(real)
    assert real.engine.stats().finished["abort"] > aborted
    assert real.http.get("/health").json()["cache_usage"] == 0


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [10**9]},
        {"prompt": "x", "stop_token_ids": [10**9]},
        {"prompt": "x", "logit_bias": {"1000000000": 1}},
        {"prompt": "x", "logit_bias": {"5": 1000}},
        {"prompt": "x", "repetition_penalty": 1e-46},
        {"prompt": "x", "temperature": 1e30},
        {"prompt": "x", "top_p": 1e-46},
        {"prompt": "x", "top_k": -5},
        {"prompt": "x", "structured_outputs": {"regex": "("}},
        {"prompt": "x", "structured_outputs": {"grammar": "nonsense"}},
        {"prompt": "x", "structured_outputs": {"json": "{"}},
        {"prompt": "x", "structured_outputs": {"json": {"type": "nonsense"}}},
    ],
)
def test_what_the_engine_refuses_is_a_400(real: Any, body: dict[str, Any]) -> None:
    answer = real.http.post("/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
