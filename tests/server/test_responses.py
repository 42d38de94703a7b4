"""/v1/responses as the official client uses it: text and function calls in and out."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent


def test_a_response_whole(serve: Any) -> None:
    served = serve("v3")
    answer = served.openai.responses.create(model="test-model", instructions="Be brief.", input="Hi")
    assert (answer.output_text, answer.status, answer.error) == (served.engine.reply, "completed", None)
    assert answer.usage.output_tokens == len(served.engine.reply)
    assert served.engine.last_prompt == "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>"


def test_a_conversation_goes_on_with_the_output_as_input(serve: Any) -> None:
    served = serve("r1")
    served.engine.reply = "Hm.</think>Hello!"
    ask = served.openai.responses.create
    first = ask(model="test-model", input="Hi")
    assert [item.type for item in first.output] == ["reasoning", "message"]
    ask(
        model="test-model", input=[{"role": "user", "content": "Hi"}, *first.output, {"role": "user", "content": "So?"}]
    )
    assert "<｜User｜>Hi<｜Assistant｜>Hello!<｜end▁of▁sentence｜><｜User｜>So?" in served.engine.last_prompt


def test_the_clients_accumulator_follows_the_stream(serve: Any) -> None:
    """`responses.stream` checks the order of events: each delta needs its item and part opened before."""
    served = serve("r1")
    served.engine.reply = "They greet.\n</think>\n\nHello!"
    with served.openai.responses.stream(model="test-model", input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    reasoning = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert (text, final.output_text, reasoning) == ("Hello!", "Hello!", "They greet.")
    for begin, end in (("output_item.added", "output_item.done"), ("content_part.added", "content_part.done")):
        assert kinds.count(f"response.{begin}") == kinds.count(f"response.{end}") == 2
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_an_answer_cut_off_is_incomplete(serve: Any) -> None:
    answer = serve("v3").openai.responses.create(model="test-model", input="Hi", max_output_tokens=5)
    assert (answer.status, answer.incomplete_details.reason, answer.output_text) == (
        "incomplete",
        "max_output_tokens",
        "Hello",
    )
    assert answer.output[0].status == "incomplete"


def test_structured_output(serve: Any) -> None:
    class Step(pydantic.BaseModel):
        explanation: str

    served = serve("v3")
    served.engine.reply = '{"explanation": "because"}'
    answer = served.openai.responses.parse(model="test-model", input="Hi", text_format=Step)
    assert answer.output_parsed == Step(explanation="because")
    assert served.engine.last.params.guided.kind == "json_schema"


# ---- functions ----

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
TIME: dict[str, Any] = {"type": "function", "name": "get_time", "parameters": None, "strict": None}
SECTION = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
BONN = '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Bonn"}<｜tool▁call▁end｜>'
ULM = BONN.replace("Bonn", "Ulm")
# what the model writes, and the items it becomes
ANSWERS = {
    "text": ("Hello.", ["message"]),
    "call": (SECTION.format(BONN), ["function_call"]),
    "two calls": (SECTION.format(BONN + ULM), ["function_call"] * 2),
    "text and call": ("Let me see." + SECTION.format(BONN), ["message", "function_call"]),
    "all": (
        "Hm.</think>Well." + SECTION.format(BONN + ULM),
        ["reasoning", "message", "function_call", "function_call"],
    ),
}
THINKING = {"chat_template_kwargs": {"thinking": True}}


def strict_events(served: Any, **fields: Any) -> list[Any]:
    """The events of a stream, each as one of the client's types and no other: no field may be missing or mistyped."""
    body = {"input": "Hi", "stream": True, "tools": [WEATHER, TIME]} | fields
    answer = served.http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    judge = pydantic.TypeAdapter(ResponseStreamEvent)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    events = [judge.validate_json(line, strict=True) for line in lines]
    assert [event.type for event in events] == [json.loads(line)["type"] for line in lines]
    return events


@pytest.mark.parametrize("case", ANSWERS)
def test_items_whole_and_streamed(serve: Any, case: str) -> None:
    served = serve("v3.1")
    served.engine.reply, kinds = ANSWERS[case]
    extra = THINKING if case == "all" else {}
    whole = served.http.post("/v1/responses", json={"input": "Hi", "tools": [WEATHER, TIME]} | extra)
    answer = Response.model_validate_json(whole.text, strict=True)
    assert [item.type for item in answer.output] == kinds
    assert all(item.status == "completed" for item in answer.output)
    calls = [item for item in answer.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Bonn"}, {"city": "Ulm"}][: len(calls)]
    assert {call.name for call in calls} <= {"get_weather"} and len({call.call_id for call in calls}) == len(calls)

    events = strict_events(served, **extra)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    shown = [{k: v for k, v in item.to_dict().items() if k not in ("id", "call_id")} for item in last.response.output]
    assert shown == [{k: v for k, v in item.to_dict().items() if k not in ("id", "call_id")} for item in answer.output]
    for index, item in enumerate(last.response.output):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        assert own[0].type == "response.output_item.added" and own[0].item.status == "in_progress"
        assert own[-1].type == "response.output_item.done" and own[-1].item == item
        assert own == events[events.index(own[0]) : events.index(own[-1]) + 1], "one item after the other"
        if item.type == "function_call":
            assert own[0].item.arguments == "" and own[0].item.name == item.name
            assert {event.type for event in own[1:-2]} == {"response.function_call_arguments.delta"}
            assert "".join(event.delta for event in own[1:-2]) == item.arguments
            assert own[-2].type == "response.function_call_arguments.done" and own[-2].arguments == item.arguments
            assert {event.item_id for event in own[1:-1]} == {item.id}


def test_the_clients_accumulator_follows_calls(serve: Any) -> None:
    served = serve("v3.1")
    served.engine.reply = "Let me see." + SECTION.format(BONN)
    with served.openai.responses.stream(model="test-model", input="Hi", tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        message, call = stream.get_final_response().output
    assert message.content[0].text == "Let me see."
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Bonn"}')
    assert call.parsed_arguments == {"city": "Bonn"}


def test_calls_and_their_results_go_back_in(serve: Any) -> None:
    """As agents do it: the output's items, then an output for each call. One turn of the model stays one message."""
    served = serve("v3.1", max_model_len=2048)
    served.engine.reply = "Hm.</think>Well." + SECTION.format(BONN + ULM)
    ask = served.openai.responses.create
    first = ask(model="test-model", input="Hi", tools=[WEATHER], extra_body=THINKING)
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": output}
        for item, output in zip(first.output[2:], ("sun", [{"type": "input_text", "text": "rain"}]), strict=True)
    ]
    served.engine.reply = "Sun and rain."
    answer = ask(
        model="test-model", input=[{"role": "user", "content": "Hi"}, *first.output, *results], tools=[WEATHER]
    )
    assert answer.output_text == "Sun and rain."
    begin, end = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
    assert served.engine.last_prompt.endswith(
        f"<｜User｜>Hi<｜Assistant｜></think>Well.{SECTION.format(BONN + ULM)}<｜end▁of▁sentence｜>{begin}sun{end}{begin}rain{end}"
    )


def test_turns_of_the_model_are_told_apart(tmp_path: Any, serve: Any) -> None:
    """What a template sees of items: reasoning with what follows it, a new message where text follows text or calls."""
    shown = "m.role, m.reasoning_content | default(none), m.content, m.tool_calls | default([]) | length"
    template = "{% for m in messages %}{{ [SHOWN] | tojson }}\n{% endfor %}".replace("SHOWN", shown)
    served = serve("v3", template=template)

    def reasoning(text: str) -> dict[str, Any]:
        return {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}

    def call(number: int) -> dict[str, Any]:
        return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}

    said = {"type": "message", "role": "assistant", "id": "msg", "status": "completed"}
    items = [
        {"role": "user", "content": "1"},
        reasoning("a"),
        said | {"content": [{"type": "output_text", "text": "A", "annotations": []}]},
        call(1),
        call(2),
        {"type": "function_call_output", "call_id": "c1", "output": "r"},
        reasoning("b"),
        call(3),
        said | {"content": [{"type": "refusal", "refusal": "No."}]},
        reasoning("c"),
        {"role": "user", "content": "2"},
        reasoning("d"),
    ]
    assert served.http.post("/v1/responses", json={"input": items}).status_code == 200
    rows = [json.loads(line) for line in served.engine.last_prompt.splitlines()]
    assert rows == [
        ["user", None, "1", 0],
        ["assistant", "a", "A", 2],
        ["tool", None, "r", 0],
        ["assistant", "b", None, 1],
        ["assistant", None, "No.", 0],
        ["user", None, "2", 0],
    ]


def test_tool_choice(serve: Any) -> None:
    served = serve("v3.1")
    ask = served.openai.responses.create
    served.engine.reply = '{"city": "Bonn"}'
    named: Any = {"type": "function", "name": "get_weather"}
    answer = ask(model="test-model", input="Hi", tools=[WEATHER, TIME], tool_choice=named)
    (call,) = answer.output
    assert (call.type, call.name, call.arguments) == ("function_call", "get_weather", '{"city": "Bonn"}')
    assert answer.tool_choice.name == "get_weather" and [tool.name for tool in answer.tools] == [
        "get_weather",
        "get_time",
    ]
    assert json.loads(served.engine.last.params.guided.source)["required"] == ["city"]

    served.engine.reply = SECTION.format(BONN + ULM)
    one = ask(model="test-model", input="Hi", tools=[WEATHER], parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["function_call", "message"], "the second call stays text"
    assert one.output[0].arguments == '{"city": "Bonn"}' and one.parallel_tool_calls is False
    none = ask(model="test-model", input="Hi", tools=[WEATHER], tool_choice="none")
    assert [item.type for item in none.output] == ["message"] and "## Tools" not in served.engine.last_prompt


def test_a_call_cut_off_is_incomplete(serve: Any) -> None:
    served = serve("v3.1")
    served.engine.reply = SECTION.format(BONN)
    arguments = len('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city')
    limit = arguments - sum(
        len(mark) - 1 for mark in ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>")
    )
    events = strict_events(served, max_output_tokens=limit)
    assert events[-1].type == "response.incomplete"
    assert [item.status for item in events[-1].response.output] == ["incomplete"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_told(serve: Any, stream: bool) -> None:
    served = serve("v3")
    served.engine.failure = "broke"
    answer = served.http.post("/v1/responses", json={"input": "Hi", "stream": stream})
    if stream:
        assert "event: response.failed" in answer.text and "broke" in answer.text
    else:
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "broke")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "'web_search'"),
        ({"tools": [WEATHER, {"type": "custom", "name": "x"}]}, "'custom'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "not among the tools"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "'item_reference'"),
        ({"input": [{"type": "web_search_call", "id": "ws_1", "status": "completed"}]}, "'web_search_call'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0"),
        ({"input": [{"type": "reasoning", "id": "rs", "summary": []}]}, "input has no message"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
    ],
    ids=str,
)
def test_what_is_not_served_is_refused(serve: Any, fields: dict[str, Any], says: str) -> None:
    answer = serve("v3").http.post("/v1/responses", json={"input": "Hi"} | fields)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_what_asks_for_nothing_is_taken(serve: Any) -> None:
    """What the Agents SDK and Codex send along."""
    fields = {
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "background": False,
        "truncation": "disabled",
        "reasoning": {"effort": "medium", "summary": "auto"},
        "text": {"verbosity": "low"},
        "prompt_cache_key": "x",
        "metadata": {"a": "b"},
        "previous_response_id": None,
    }
    answer = serve("v3").http.post("/v1/responses", json={"input": "Hi"} | fields)
    assert Response.model_validate_json(answer.text, strict=True).metadata == {"a": "b"}
