"""Two options that constrain the output: both hold, or the request is refused and both are named."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from leanseek.engine import Guide, Tokenizer
from leanseek.engine.guidance import Grammars

SCHEMA = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/At"}},
    "required": ["at"],
    "additionalProperties": False,
    "$defs": {"At": {"enum": ["Bonn", "Ulm"]}},  # as pydantic writes schemas
}
JSON_FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "get_time"}},
    {"type": "function", "function": {"name": "get_news", "parameters": {"properties": {"n": {"type": "integer"}}}}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
FORMS: dict[str, dict[str, Any]] = {
    "response_format": {"response_format": JSON_FORM},
    "json_object": {"response_format": {"type": "json_object"}},
    "json": {"structured_outputs": {"json": SCHEMA}},
    "choice": {"structured_outputs": {"choice": ["a", "b"]}},
    "regex": {"structured_outputs": {"regex": "a+"}},
    "grammar": {"structured_outputs": {"grammar": 'start: "a"'}},
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "named": {"tools": TOOLS, "tool_choice": NAMED},
    "form or calls": {"tools": TOOLS, "response_format": JSON_FORM},
}
NAMES = {"json_object": "response_format", "required": "tool_choice", "named": "tool_choice"} | dict.fromkeys(
    ("json", "choice", "regex", "grammar"), "structured_outputs"
)
NAMES |= {"form or calls": "response_format", "response_format": "response_format"}
ENDS: dict[str, dict[str, Any]] = {
    "stop": {"stop": ["x"]},
    "stop_token_ids": {"stop_token_ids": [9]},
    "min_tokens": {"min_tokens": 3},
    "ignore_eos": {"ignore_eos": True},
    "chat_template_kwargs.thinking": {"chat_template_kwargs": {"thinking": True}},
}
HARMLESS: list[dict[str, Any]] = [
    {"max_tokens": 5},
    {"logit_bias": {"1": -100}},
    {"n": 2},
    {"logprobs": True, "top_logprobs": 2},
    {"parallel_tool_calls": False},
    {"stop": []},
    {"stop": None, "stop_token_ids": [], "min_tokens": 0, "ignore_eos": False},
    {"chat_template_kwargs": {"thinking": False}},
]


def refusal(answer: Any) -> str:
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_and_what_would_end_it_elsewhere(shared: Any, form: str, end: str) -> None:
    served = shared("v3.1", max_model_len=8192)
    answer = served.chat(**FORMS[form], **ENDS[end])
    if form in ("regex", "grammar") and end.startswith("stop"):  # texts that may be cut: both reach the engine
        params = served.engine.last.params
        assert answer.status_code == 200 and params.guided and (params.stop or params.stop_token_ids)
        return
    assert end in refusal(answer) and NAMES[form] in refusal(answer)
    assert not served.engine.seen, "refused before anything runs"


@pytest.mark.parametrize("more", HARMLESS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_and_what_leaves_it_whole(shared: Any, form: str, more: dict[str, Any]) -> None:
    served = shared("v3.1", max_model_len=8192)
    served.engine.reply = '{"at": "Bonn"}'
    assert served.chat(**FORMS[form], **more).status_code == 200
    assert served.engine.last.params.guided


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (FORMS["response_format"] | FORMS["regex"], ("response_format", "structured_outputs")),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, ("one of structured_outputs",)),
        *((FORMS[each] | FORMS["required"], ("structured_outputs", "tool_choice")) for each in ("json", "regex")),
        *((FORMS[each] | FORMS["named"], ("structured_outputs", "tool_choice")) for each in ("choice", "grammar")),
        *((FORMS[each] | {"tools": TOOLS}, ("structured_outputs", "tools")) for each in ("choice", "regex", "grammar")),
        ({"tool_choice": "required"}, ("tool_choice", "tools")),
        ({"tool_choice": NAMED}, ("tool_choice", "tools")),
        ({"top_logprobs": 2}, ("top_logprobs", "logprobs")),
        ({"max_tokens": 3, "max_completion_tokens": 4}, ("max_tokens", "max_completion_tokens")),
        ({"min_tokens": 4, "max_tokens": 3}, ("min_tokens", "max_tokens")),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}
         | {"tool_choice": "required"}, ("'f'", "object")),
    ],
)  # fmt: skip
def test_chat_refuses_by_name(shared: Any, fields: dict[str, Any], names: tuple[str, ...]) -> None:
    message = refusal(shared("v3", max_model_len=8192).chat(**fields))
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"echo": True, "suffix": "b"}, ("echo", "suffix")),
        ({"best_of": 3}, ("best_of", "n")),
        ({"best_of": 1, "n": 2}, ("best_of", "n")),
        *((FORMS["response_format"] | {name: value}, (name, "response_format"))
          for name, value in (("stop", "x"), ("ignore_eos", True), ("min_tokens", 2), ("stop_token_ids", [5]))),
        ({"suffix": "b", "prompt": [5]}, ("suffix", "prompt")),
    ],
)  # fmt: skip
def test_completions_refuse_by_name(shared: Any, fields: dict[str, Any], names: tuple[str, ...]) -> None:
    message = refusal(shared("plain").http.post("/v1/completions", json={"prompt": "a"} | fields))
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 2, "n": 2},
        {"best_of": 1},
        {"echo": True, "n": 2, "logprobs": 1, "stop": "x"},
        {"echo": True} | FORMS["choice"],
        {"suffix": "b", "n": 2, "logprobs": 1} | FORMS["regex"],
        {"stop": "e", "min_tokens": 3, "ignore_eos": True, "stop_token_ids": [5], "logit_bias": {"1": 100}},
    ],
)
def test_completions_honour_both(shared: Any, fields: dict[str, Any]) -> None:
    answer = shared("plain").http.post("/v1/completions", json={"prompt": "a"} | fields)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == fields.get("n", 1)


@pytest.mark.parametrize("end", ENDS)
def test_responses_refuse_by_name(shared: Any, end: str) -> None:
    served = shared("v3.1", max_model_len=8192)
    form = {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, "input": "Hi"}
    message = refusal(served.http.post("/v1/responses", json=form | ENDS[end]))
    assert end in message and "text.format" in message
    message = refusal(served.http.post("/v1/responses", json=form | FORMS["choice"]))
    assert "text.format" in message and "structured_outputs" in message


# ---- what the grammars let through ----


@functools.cache
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.inner.get_vocab_size(), [1])


def accepts(tokenizer: Tokenizer, guide: Guide, text: str) -> bool:
    matcher = grammars(tokenizer).compile(guide).copy()
    inner = matcher._inner
    taken = all(inner.consume_token(token) for token in tokenizer.encode(text, add_special_tokens=False))
    return taken and bool(inner.is_accepting())


def called(family: str, *calls: tuple[str, str]) -> str:
    """Calls as the family writes them."""
    if family == "kimi":
        mark = "<|tool_call{}|>".format
        bodies = [
            f"{mark('_begin')}functions.{name}:{place}{mark('_argument_begin')}{arguments}{mark('_end')}"
            for place, (name, arguments) in enumerate(calls)
        ]
        return f"{mark('s_section_begin')}{''.join(bodies)}{mark('s_section_end')}"
    wrap = "function<｜tool▁sep｜>{}\n```json\n{}\n```" if family in ("v3", "r1") else "{}<｜tool▁sep｜>{}"
    bodies = [f"<｜tool▁call▁begin｜>{wrap.format(*call)}<｜tool▁call▁end｜>" for call in calls]
    return f"<｜tool▁calls▁begin｜>{''.join(bodies)}<｜tool▁calls▁end｜>"


@pytest.mark.parametrize("family", ["v3", "r1", "v3.1", "kimi"])
def test_a_form_beside_tools_allows_either(shared: Any, family: str) -> None:
    served = shared(family, max_model_len=8192)
    served.engine.reply = called(family, ("get_weather", '{"at": "Bonn"}'), ("get_time", "{}"))
    (choice,) = served.chat(tools=TOOLS, response_format=JSON_FORM).json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather", "get_time"]
    guide, tokenizer = served.engine.last.params.guided, served.engine.tokenizer
    assert accepts(tokenizer, guide, served.engine.reply)
    assert accepts(tokenizer, guide, '{"at": "Ulm"}')
    for wrong in (
        '{"at": "Rom"}',
        "Hello",
        called(family, ("get_weather", '{"at": "Rom"}')),
        called(family, ("f", "{}")),
    ):
        assert not accepts(tokenizer, guide, wrong), wrong
    served.chat(tools=TOOLS, response_format=JSON_FORM, parallel_tool_calls=False)
    single = served.engine.last.params.guided
    assert not accepts(tokenizer, single, served.engine.reply)
    assert accepts(tokenizer, single, called(family, ("get_time", "{}")))
    served.chat(tools=TOOLS, response_format={"type": "json_object"}, tool_choice="none")
    assert served.engine.last.params.guided == Guide.json_object()


@pytest.mark.parametrize(
    ("tool", "right", "wrong"),
    [
        (0, ['{"at": "Bonn"}'], ["{}", '{"at": "Rom"}', "5"]),
        (1, ["{}"], ['{"a": 1}', "[]", "null", '""']),
        (2, ["{}", '{"n": 5}'], ['{"n": "5"}', "5"]),
    ],
)
def test_a_forced_call_takes_its_parameters_alone(shared: Any, tool: int, right: list[str], wrong: list[str]) -> None:
    """Also beside other functions: references in a schema hold there too."""
    served = shared("v3", max_model_len=8192)
    name = TOOLS[tool]["function"]["name"]
    served.chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": name}})
    one = served.engine.last.params.guided
    served.chat(tools=TOOLS, tool_choice="required")
    several = served.engine.last.params.guided
    for text in right + wrong:
        assert accepts(served.engine.tokenizer, one, text) == (text in right), text
        call = f'{{"name": "{name}", "arguments": {text}}}'
        assert accepts(served.engine.tokenizer, several, call) == (text in right), text


def test_one_call_where_calls_may_not_be_parallel(serve: Any) -> None:
    """What the model writes beyond it stays in the answer."""
    served = serve("v3.1", max_model_len=8192)
    served.engine.reply = called("v3.1", ("get_time", "{}"), ("get_news", '{"n": 5}'))
    (choice,) = served.chat(tools=TOOLS, parallel_tool_calls=False).json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_time"]
    assert '{"n": 5}' in choice["message"]["content"]


def test_the_templates_own_stop_strings_do_not_cut_a_form(serve: Any) -> None:
    served = serve("plain")
    assert served.chat().status_code == 200 and served.engine.last.params.stop
    served.chat(response_format=JSON_FORM)
    assert served.engine.last.params.stop is None
