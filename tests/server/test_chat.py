"""/v1/chat/completions as the official client uses it."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pydantic
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from pydantic import JsonValue

from leanseek.server.errors import as_api_error
from leanseek.server.run import make_service
from leanseek.server.schema import ChatRequest, CompletionRequest, ResponsesRequest
from leanseek.server.templates import TemplateError

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
CALL = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
WEATHER = CALL.format('get_weather<｜tool▁sep｜>{"city": "Hangzhou"}')
HI: list[Any] = [{"role": "user", "content": "Hi"}]


def test_an_answer_whole(serve: Any) -> None:
    served = serve("v3")
    answer = served.openai.chat.completions.create(model="test-model", messages=HI, n=2)
    assert [choice.message.content for choice in answer.choices] == [served.engine.reply] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    tokens = len(served.engine.reply)
    assert answer.usage and answer.usage.completion_tokens == 2 * tokens
    assert answer.usage.prompt_tokens == len(served.engine.last.prompt), "counted once, however many choices"
    assert answer.usage.prompt_tokens_details.cached_tokens == len(served.engine.last.prompt) // 2
    details = answer.usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (2 * tokens, 2 * tokens)
    assert served.engine.last_prompt == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>", "one BOS: the template's"


def test_an_answer_streamed(serve: Any) -> None:
    served = serve("v3")
    stream = served.openai.chat.completions.create(
        model="test-model", messages=HI, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == served.engine.reply
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 2 * len(served.engine.reply)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_in_every_chunk(serve: Any) -> None:
    options: Any = {"continuous_usage_stats": True}
    stream = serve("v3").openai.chat.completions.create(
        model="test-model", messages=HI, max_tokens=3, stream=True, stream_options=options
    )
    assert [chunk.usage.completion_tokens for chunk in stream] == [1, 1, 2, 3], "the role comes with the first token"


def test_a_stop_string_and_max_tokens_end_an_answer(serve: Any) -> None:
    served = serve("v3")
    ask = served.openai.chat.completions.create
    stopped = ask(model="test-model", messages=HI, stop=["how", "zzz"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("Hello there, ", "stop")
    for limit in ("max_tokens", "max_completion_tokens"):
        cut = ask(model="test-model", messages=HI, **{limit: 5})
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("Hello", "length")


def test_max_tokens_beyond_the_context_mean_to_its_end(serve: Any) -> None:
    served = serve("v3", max_model_len=64)
    served.openai.chat.completions.create(model="test-model", messages=HI, max_tokens=10_000)
    assert served.engine.last.params.max_tokens == 64 - len(served.engine.last.prompt)


def test_sampling_parameters_reach_the_engine_over_the_models_defaults(serve: Any) -> None:
    served = serve("v3")
    served.engine.defaults = {"temperature": 0.6, "top_p": 0.95}
    served.openai.chat.completions.create(
        model="test-model",
        messages=HI,
        temperature=0,
        seed=7,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={"5": -100},
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "stop_token_ids": [9]},
    )
    params = served.engine.last.params
    assert (params.temperature, params.top_p, params.seed, params.top_k, params.min_p) == (0, 0.95, 7, 3, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, 0.25, 1.1)
    assert (dict(params.logit_bias), params.min_tokens, params.stop_token_ids) == ({5: -100}, 2, (9,))


def test_logprobs(serve: Any) -> None:
    served = serve("v3")
    ask = served.openai.chat.completions.create
    answer = ask(model="test-model", messages=HI, logprobs=True, top_logprobs=3, max_tokens=2)
    first, second = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes, second.token) == ("H", -0.5, [72], "e")
    assert [other.logprob for other in first.top_logprobs] == pytest.approx([-0.5, -1.2, -1.9])
    stream = ask(model="test-model", messages=HI, logprobs=True, max_tokens=2, stream=True)
    tokens = [
        entry.token for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
    ]
    assert tokens == ["H", "e"]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart(serve: Any, stream: bool) -> None:
    """R1's prompt ends inside <think>."""
    served = serve("r1")
    served.engine.reply = "They greet me.\n</think>\n\nHello!"
    answer = served.openai.chat.completions.create(model="test-model", messages=HI, stream=stream)
    assert served.engine.last_prompt.endswith("<｜Assistant｜><think>\n")
    if not stream:
        message = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("They greet me.", "Hello!")
        reasoning = answer.usage.completion_tokens_details.reasoning_tokens
        assert 14 <= reasoning <= 16, "a token a character, the mark is one"
        return
    deltas = [chunk.choices[0].delta for chunk in answer]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "They greet me."
    assert "".join(delta.content or "" for delta in deltas) == "Hello!"


THOUGHTS = [  # reply, tokens of the reasoning: one a character, marks are one each
    ("Hm.</think>Hi!", 4),
    ("Hm.\n</think>\n\nHi!", 5),
    ("Hm", 2),
    ("<think>Hm.</think>Hi!", 5),
    ("", 0),
    ("Hm." + WEATHER, 3 + 2),  # the call ends it; what begins the call is counted until then
]


@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("reply", "count"), THOUGHTS)
def test_reasoning_tokens_are_counted_however_many_come_at_once(
    shared: Any, tokens: int, stream: bool, reply: str, count: int
) -> None:
    served = shared("r1")
    served.engine.reply, served.engine.tokens_per_delta = reply or "</think>", tokens
    fields = {"stream_options": {"include_usage": True}} if stream else {}
    answer = served.chat(stream=stream, tools=TOOLS, **fields)
    usage = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")] or [answer.json()]
    assert usage[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == (count or 1)


@pytest.mark.parametrize("tokens", [1, 4, 100])
@pytest.mark.parametrize("path", ["chat", "responses"])
def test_a_delta_is_reasoning_or_content(shared: Any, tokens: int, path: str) -> None:
    served = shared("r1")
    served.engine.reply, served.engine.tokens_per_delta = "Hm.</think>Hi! " + WEATHER, tokens
    if path == "responses":
        answer = served.http.post("/v1/responses", json={"input": "Hi", "stream": True}).text
        assert answer.count("event: response.reasoning_text.done") == 1
        return
    body = {"stream": True, "tools": TOOLS, "logprobs": True}
    lines = [line for line in served.chat(**body).text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(line[6:])["choices"][0] for line in lines]
    kinds = [set(choice["delta"]) - {"role"} for choice in choices[1:]]
    assert all(len(kind) <= 1 for kind in kinds)
    assert set().union(*kinds) == {"reasoning_content", "content", "tool_calls"}
    told = [[each["token"] for each in (choice["logprobs"] or {"content": []})["content"]] for choice in choices]
    assert "".join(token for tokens in told for token in tokens) == served.engine.reply
    thought = [
        token
        for choice, tokens in zip(choices, told, strict=True)
        for token in tokens
        if "reasoning_content" in choice["delta"]
    ]
    assert "H" in thought and "i" not in thought


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("family", "reply", "stop", "content"),
    [
        ("r1", "One. Two.</think>Three. Four.", ".", "Three"),
        ("r1", "One</think>", "</think>", ""),
        ("v3.1", "<think>One. Two.</think>Three. Four.", ".", "Three"),
        ("v3.1", "Three. Four.", ".", "Three"),
        ("v3", "Three. Four.", ".", "Three"),
    ],
)
def test_stop_strings_count_in_the_answer_alone(
    serve: Any, path: str, family: str, reply: str, stop: str, content: str
) -> None:
    served = serve(family)
    served.engine.reply = reply
    if path == "/v1/responses":
        output = served.http.post(path, json={"input": "Hi", "stop": stop}).json()["output"]
        assert "".join(item["content"][0]["text"] for item in output if item["type"] == "message") == content
        return
    message = served.chat(stop=stop).json()["choices"][0]["message"]
    assert message["content"] == content
    assert message.get("reasoning_content", "") == reply.removeprefix("<think>").partition("</think>")[0] * (
        "think" in reply
    )


@pytest.mark.parametrize("stop", ["`", "\n", "city", "}", "<｜tool▁sep｜>"])
def test_stop_strings_do_not_cut_calls(serve: Any, stop: str) -> None:
    served = serve("v3")
    calls = "".join(
        f'<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{{"city": "{city}"}}\n```<｜tool▁call▁end｜>\n'
        for city in ("Bonn", "Ulm")
    )
    served.engine.reply = f"Look: <｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>done{stop}!"
    (choice,) = served.chat(stop=stop, tools=TOOLS).json()["choices"]
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [
        '{"city": "Bonn"}',
        '{"city": "Ulm"}',
    ]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Look: done", "tool_calls")


def test_the_thinking_switch(serve: Any) -> None:
    served = serve("v3.1")
    served.engine.reply = "Hm.</think>Hello!"
    ask = served.openai.chat.completions.create
    on = ask(model="test-model", messages=HI, extra_body={"chat_template_kwargs": {"thinking": True}})
    assert (on.choices[0].message.reasoning_content, on.choices[0].message.content) == ("Hm.", "Hello!")
    served.engine.reply = "Hello!"
    off = ask(model="test-model", messages=HI)
    assert served.engine.last_prompt.endswith("<｜Assistant｜></think>")
    assert off.choices[0].message.content == "Hello!" and not hasattr(off.choices[0].message, "reasoning_content")


def test_a_tool_call_and_its_result(serve: Any) -> None:
    served = serve("v3.1")
    served.engine.reply = "Let me see." + WEATHER
    ask = served.openai.chat.completions.create
    message = ask(model="test-model", messages=HI, tools=TOOLS).choices[0].message
    (call,) = message.tool_calls
    assert (message.content, call.function.name, call.function.arguments) == (
        "Let me see.",
        "get_weather",
        '{"city": "Hangzhou"}',
    )
    assert "### get_weather\nDescription: the weather" in served.engine.last_prompt
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    ask(model="test-model", messages=[*HI, message, result], tools=TOOLS)
    assert served.engine.last_prompt.endswith(
        WEATHER + "<｜end▁of▁sentence｜><｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>"
    )


def test_a_tool_call_streamed(serve: Any) -> None:
    served = serve("v3.1")
    served.engine.reply = WEATHER
    stream = served.openai.chat.completions.create(model="test-model", messages=HI, tools=TOOLS, stream=True)
    choices = [chunk.choices[0] for chunk in stream]
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert calls[0].id and calls[0].function.name == "get_weather" and not calls[1].id
    assert "".join(call.function.arguments for call in calls) == '{"city": "Hangzhou"}'
    assert not any(choice.delta.content for choice in choices)
    assert choices[-1].finish_reason == "tool_calls"


def test_tool_choice(serve: Any) -> None:
    served = serve("v3.1")
    ask = served.openai.chat.completions.create
    served.engine.reply = '{"city": "Bonn"}'
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = ask(model="test-model", messages=HI, tools=TOOLS, tool_choice=named)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Bonn"}')
    assert json.loads(served.engine.last.params.guided.source)["required"] == ["city"]

    served.engine.reply = '{"name": "get_time", "arguments": {}}'
    answer = ask(model="test-model", messages=HI, tools=TOOLS, tool_choice="required")
    assert answer.choices[0].message.tool_calls[0].function.name == "get_time"
    assert answer.choices[0].finish_reason == "tool_calls"

    served.engine.reply = WEATHER
    answer = ask(model="test-model", messages=HI, tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.tool_calls is None and "## Tools" not in served.engine.last_prompt

    served.engine.reply = "<｜tool▁calls▁begin｜>" + WEATHER.replace("<｜tool▁calls▁begin｜>", "") * 2
    answer = ask(model="test-model", messages=HI, tools=TOOLS, parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls) == 1


def test_structured_output_as_the_client_parses_it(serve: Any) -> None:
    class Step(pydantic.BaseModel):
        explanation: str

    served = serve("r1")
    served.engine.reply = '{"explanation": "because"}'
    answer = served.openai.chat.completions.parse(model="test-model", messages=HI, response_format=Step)
    assert answer.choices[0].message.parsed == Step(explanation="because")
    assert json.loads(served.engine.last.params.guided.source)["required"] == ["explanation"]
    assert served.engine.last_prompt.endswith("<think>\n</think>\n\n"), "guided output leaves no room for reasoning"
    served.openai.chat.completions.create(model="test-model", messages=HI, response_format={"type": "json_object"})
    assert json.loads(served.engine.last.params.guided.source) == {"type": "object"}


def test_guides_under_vllms_name(serve: Any) -> None:
    served = serve("v3")
    for given, kind in (
        ({"regex": "[0-9]+"}, "regex"),
        ({"choice": ["a", "b"]}, "grammar"),
        ({"json": {}}, "json_schema"),
    ):
        assert served.chat(structured_outputs=given).status_code == 200
        assert served.engine.last.params.guided.kind == kind
    for wrong in ({"regex": "a", "choice": ["b"]}, {}, {"choice": []}):
        assert served.chat(structured_outputs=wrong).status_code == 400
    both = served.chat(structured_outputs={"regex": "a"}, response_format={"type": "json_object"})
    assert both.status_code == 400


def test_content_in_parts_and_the_developer_role(serve: Any) -> None:
    served = serve("v3")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    served.chat(messages=[{"role": "developer", "content": "S"}, {"role": "user", "content": parts}])
    assert served.engine.last_prompt == "<｜begin▁of▁sentence｜>S<｜User｜>ab<｜Assistant｜>"


CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}, "x": {"y": None}}]


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ({"role": "user", "content": "Hi", "name": "Ann", "x": [1, None]}, None),
        ({"role": "assistant", "content": "A", "reasoning_content": "R"}, None),
        ({"role": "assistant", "content": "", "tool_calls": CALLS}, None),
        ({"role": "assistant", "content": None, "tool_calls": CALLS}, None),
        ({"role": "assistant", "tool_calls": CALLS}, {"role": "assistant", "tool_calls": CALLS, "content": None}),
        ({"role": "tool", "content": "r", "tool_call_id": "c1", "name": "f"}, None),
        ({"role": "system", "content": "S", "tools": [{"type": "function", "function": {"name": "g"}}]}, None),
        # what the openai client dumps of its own messages
        (
            {"role": "assistant", "content": "A", "refusal": None, "tool_calls": None, "function_call": None},
            {"role": "assistant", "content": "A"},
        ),
        ({"role": "assistant", "content": "A", "tool_calls": []}, {"role": "assistant", "content": "A"}),
        # refusals
        (
            {"role": "assistant", "content": None, "refusal": "No."},
            {"role": "assistant", "content": "No.", "refusal": "No."},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "assistant", "content": "No."},
        ),
    ],
    ids=str,
)
def test_the_template_sees_what_the_client_sent(serve: Any, sent: dict[str, Any], seen: dict[str, Any] | None) -> None:
    served = serve("v3", template="{{ messages | tojson }}")
    assert served.chat(messages=[sent]).status_code == 200
    assert json.loads(served.engine.last_prompt) == [seen or sent]


def test_the_template_sees_tools_and_switches(serve: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}, "strict": True}, "x": 1}
    served = serve("v3", template="{{ [tools, add_generation_prompt, reasoning_effort, k] | tojson }}")
    more = {"reasoning_effort": "low", "chat_template_kwargs": {"k": 5}}
    assert served.chat(tools=[tool], add_generation_prompt=False, **more).status_code == 200
    assert json.loads(served.engine.last_prompt) == [[tool], False, "low", 5]


@pytest.mark.parametrize(
    ("loop", "parts"),
    [
        ("{% for p in m.content %}<{{ p.type }}:{{ p.text }}>{% endfor %}", True),
        ("{% for p in m['content'] | list %}<{{ p.type }}:{{ p.text }}>{% endfor %}", True),
        ("{% set c = m['content'] %}{% for p in c %}<{{ p.type }}:{{ p.text }}>{% endfor %}", True),
        ("{% macro w(content) %}{% for p in content %}<{{ p.type }}:{{ p.text }}>{% endfor %}{% endmacro %}"
         "{{ w(m.content) }}", True),
        ("{{ m.content }}", False),
        ("{% for p in m.content.split(' ') %}{{ p }}{% endfor %}", False),
    ],
)  # fmt: skip
def test_parts_reach_a_template_that_loops_over_them(serve: Any, loop: str, parts: bool) -> None:
    served = serve("v3", template="{% for m in messages %}" + loop + "{% endfor %}")
    content = [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    assert served.chat(messages=[{"role": "assistant", "content": content}]).status_code == 200
    assert served.engine.last_prompt == ("<text:a><text:b><text:c>" if parts else "abc")


BEGUN = {"role": "assistant", "content": "Once "}


@pytest.mark.parametrize("fields", [{"continue_final_message": True}, {"prefix": True}], ids=str)
@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("v3", "<｜User｜>Hi<｜Assistant｜>Once "),
        ("r1", "<｜User｜>Hi<｜Assistant｜>Once "),
        ("v3.1", "<｜User｜>Hi<｜Assistant｜></think>Once "),
        ("plain", "User: Hi\n\nAssistant: Once "),
        ("kimi", "<|im_assistant|>assistant<|im_middle|>Once "),
    ],
)
def test_an_answer_goes_on_from_what_the_client_began(serve: Any, family: str, ends: str, fields: Any) -> None:
    """No end token, and no second beginning, stands between."""
    served = serve(family)
    message, fields = (BEGUN | fields, {}) if "prefix" in fields else (BEGUN, fields)
    answer = served.chat(messages=[*HI, message], **fields).json()
    assert served.engine.last_prompt.endswith(ends)
    assert answer["choices"][0]["message"]["content"] == served.engine.reply
    counted = served.http.post("/tokenize", json={"messages": [*HI, message], **fields}).json()
    assert counted["tokens"] == served.engine.last.prompt


@pytest.mark.parametrize(
    ("family", "begun", "kwargs", "reply", "told"),
    [
        ("v3.1", "I th", {"thinking": True}, "ink.</think>Hi.", ("ink.", "Hi.")),
        ("v3.1", "I th", {}, "e answer", (None, "e answer")),
        ("v3.1", "I think.</think>H", {"thinking": True}, "i.", (None, "i.")),
        ("r1", "<think>I th", {}, "ink.</think>Hi.", ("ink.", "Hi.")),
        ("r1", "<think>I think.</think>H", {}, "i.", (None, "i.")),
    ],
)
def test_a_begun_answer_goes_on_inside_or_behind_its_reasoning(
    serve: Any, family: str, begun: str, kwargs: Any, reply: str, told: Any
) -> None:
    served = serve(family)
    served.engine.reply = reply
    messages = [*HI, {"role": "assistant", "content": begun, "prefix": True}]
    message = served.chat(messages=messages, chat_template_kwargs=kwargs).json()["choices"][0]["message"]
    assert served.engine.last_prompt.endswith(begun)
    assert (message.get("reasoning_content"), message["content"]) == told


def test_a_folders_template_goes_on_too(serve: Any) -> None:
    """Trimmed and in parts; one that does not write the text as it is cannot."""
    begun = [*HI, BEGUN]
    trims = serve("v3", template="{% for m in messages %}[{{ m.content | trim }}]{% endfor %}G")
    assert trims.chat(messages=begun, continue_final_message=True).status_code == 200
    assert trims.engine.last_prompt == "[Hi][Once "
    loops = serve(
        "r1", template="{% for m in messages %}[{% for p in m.content %}{{ p.text }}{% endfor %}]{% endfor %}"
    )
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "Once "}, {"type": "text", "text": "up"}]}]
    assert loops.chat(messages=parts, continue_final_message=True).status_code == 200
    assert loops.engine.last_prompt == "[Once up"
    drops = serve("plain", template="{{ messages[0].content }}")
    answer = drops.chat(messages=begun, continue_final_message=True)
    assert answer.status_code == 400 and "changes the text of the last message" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": HI, "continue_final_message": True}, "from the assistant"),
        ({"messages": [*HI, BEGUN], "continue_final_message": True, "add_generation_prompt": True}, "send only one"),
        ({"messages": [*HI, BEGUN | {"prefix": True}], "add_generation_prompt": True}, "send only one"),
        ({"messages": [*HI, BEGUN | {"prefix": True}], "continue_final_message": False}, "contradicts"),
        ({"messages": [BEGUN | {"prefix": True}, *HI]}, "the last message"),
        ({"messages": [{"role": "user", "content": "Hi", "prefix": True}]}, "from the assistant"),
        ({"messages": [*HI, BEGUN | {"tool_calls": CALLS}], "continue_final_message": True}, "without tool_calls"),
        (
            {"messages": [*HI, BEGUN], "continue_final_message": True, "response_format": {"type": "json_object"}},
            "a form starts a new answer",
        ),
    ],
    ids=str,
)
def test_contradictions_about_the_end_are_refused(serve: Any, fields: dict[str, Any], says: str) -> None:
    answer = serve("v3").chat(**fields)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_a_template_given_to_the_server(serve: Any, tmp_path: Any) -> None:
    """It takes the place of the folder's, whose stop strings go with it."""
    served = serve("plain", template="folder")
    file = tmp_path / "own.jinja"
    file.write_text("own {{ messages[0].content }} {{ ''.__class__.__mro__ }}")
    service = make_service(served.engine, "test-model", file)
    with pytest.raises(TemplateError, match="unsafe"):
        service.template.render(HI)
    file.write_text("own {{ messages[0].content }}")
    service = make_service(served.engine, "test-model", file)
    assert (service.template.render(HI), service.template.stop) == ("own Hi", ())
    for wrong, says in ((tmp_path, "is not a file"), (tmp_path / "none", "is not a file")):
        with pytest.raises(TemplateError, match=says):
            make_service(served.engine, "test-model", wrong)
    file.write_bytes(b"\xff")
    with pytest.raises(TemplateError, match=r"own\.jinja is not UTF-8 at byte 0"):
        make_service(served.engine, "test-model", file)


# ---- fields ----

ENDPOINTS = [
    ("/v1/chat/completions", ChatRequest, chat_params.CompletionCreateParamsBase, {"messages": HI}),
    ("/v1/completions", CompletionRequest, completion_params.CompletionCreateParamsBase, {"prompt": "Hi"}),
    ("/v1/responses", ResponsesRequest, response_params.ResponseCreateParamsBase, {"input": "Hi"}),
]


@pytest.mark.parametrize(("path", "body", "theirs", "least"), ENDPOINTS)
def test_every_field_of_the_openai_client_is_known(path: str, body: Any, theirs: Any, least: Any) -> None:
    """A field that OpenAI adds is honoured, ignored or refused on purpose; the docs list those of the last two kinds."""
    unknown = typing.get_type_hints(theirs).keys() - body.model_fields.keys()
    assert not unknown, f"{path}: decide what becomes of {unknown}"
    docs = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    section = next(part for part in docs.split("\n### ") if part.startswith(f"`{path}`"))
    assert not [
        name for name in (*kinds(body, ignored=True), *kinds(body, ignored=False)) if f"`{name}`" not in section
    ]


def kinds(body: Any, ignored: bool) -> list[str]:
    """Fields of any JSON value: those without a check are ignored, those with one refused."""
    loose = {name: field for name, field in body.model_fields.items() if field.annotation is JsonValue}
    return [name for name, field in loose.items() if bool(field.metadata) != ignored]


@pytest.mark.parametrize(("path", "body", "theirs", "least"), ENDPOINTS)
def test_refused_fields_are_refused_by_name_and_ignored_ones_taken(
    serve: Any, path: str, body: Any, theirs: Any, least: Any
) -> None:
    def refusal(name: str, value: Any) -> str | None:
        try:
            body.model_validate_json(json.dumps(least | {name: value}))
        except pydantic.ValidationError as error:
            return str(as_api_error(error))
        return None

    refused = kinds(body, ignored=False)
    for name in refused:
        told = [refusal(name, value) for value in (True, "x", {"id": "x"}, ["x"], 7)]
        assert sum(message is not None for message in told) >= 4  # one of them may ask for nothing
        assert all(message.startswith(f"{name}: this server does not support it; ") for message in told if message)
        assert refusal(name, None) is None
    served = serve("v3")
    assert served.http.post(path, json=least | {refused[0]: {"id": "x"}}).status_code == 400
    taken = {key: [True, {"id": "x"}] for key in kinds(body, ignored=True)}
    assert taken and served.http.post(path, json=least | taken).status_code == 200


def test_a_base_model_talks_in_a_script_and_stops_where_the_user_would_speak(serve: Any) -> None:
    served = serve("plain")
    served.engine.reply = " Hello.\nUser: and now I"
    answer = served.chat().json()
    assert served.engine.last_prompt == "<｜begin▁of▁sentence｜>User: Hi\n\nAssistant:"
    assert answer["choices"][0]["message"]["content"] == " Hello."


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]}, "function_call"),
        ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "audio"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n must be"),
        ({"n": 1000}, "n must be"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "not among the tools"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ({"chat_template_kwargs": {"self": 1}}, "chat template"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_wrong_fields_are_named(shared: Any, fields: dict[str, Any], says: str) -> None:
    answer = shared("v3").chat(**fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error["message"] and error["type"] == "invalid_request_error" and "\n" not in error["message"]
