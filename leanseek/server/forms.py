"""What form a request requires of its output: a form, a forced tool call, or a form unless the model calls a tool.

Conflicting options are refused here, by name, before anything runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from leanseek.engine import Guide, Tokenizer
from leanseek.engine.guide_worker import JSON_OPTIONS
from leanseek.server.errors import ApiError
from leanseek.server.parsers import ToolFormat
from leanseek.server.schema import (
    ChatRequest,
    CompletionRequest,
    NamedTool,
    Object,
    Sampling,
    StructuredOutputs,
    TextFormat,
    Tool,
)


@dataclass(frozen=True)
class Form:
    """option: the field that requests it. whole: a part of it would be useless, so nothing may end it early."""

    option: str
    guide: Guide
    whole: bool = True


def requested_form(
    form: TextFormat | None, outputs: StructuredOutputs | None, option: str = "response_format"
) -> Form | None:
    """The form requested by `response_format` (OpenAI's, here `option`) or `structured_outputs` (vLLM's).

    Raises:
        ApiError: there is more than one form, or its schema is missing.
    """
    forms: list[Form] = []
    if form and form.type == "json_object":
        forms.append(Form(option, Guide.json_object()))
    elif form and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(400, f"{option} of type json_schema needs json_schema.schema", param=option)
        forms.append(Form(option, Guide.json_schema(form.json_schema.schema_)))
    if outputs and outputs.json_ is not None:
        forms.append(Form("structured_outputs", Guide.json_schema(outputs.json_)))
    if outputs and outputs.choice:
        forms.append(Form("structured_outputs", Guide.choice(outputs.choice)))
    if outputs and outputs.regex is not None:
        forms.append(Form("structured_outputs", Guide.regex(outputs.regex), whole=False))
    if outputs and outputs.grammar is not None:
        forms.append(Form("structured_outputs", Guide.grammar(outputs.grammar), whole=False))
    if len(forms) != bool(forms or outputs):
        raise ApiError(400, f"give one form of output: {option}, or one of structured_outputs")
    return forms[0] if forms else None


def check_form(form: Form | None, request: Sampling, variables: Object | None = None) -> None:
    """Raises ApiError if the request conflicts with a form, which ends by itself and has no room for reasoning.

    variables: those of the chat template
    """
    if form is None:
        return
    thinking = next((name for name in ("thinking", "enable_thinking") if (variables or {}).get(name) is True), None)
    conflicts = {
        "stop": form.whole and request.stop,
        "stop_token_ids": form.whole and request.stop_token_ids,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        f"chat_template_kwargs.{thinking}": thinking,
    }
    for name, value in conflicts.items():
        if value:
            why = (
                "the form leaves no room for reasoning" if thinking and value is thinking else "the form ends by itself"
            )
            raise ApiError(400, f"{name} and {form.option} cannot be combined: {why}; leave one out", param=name)


def check_chat(request: ChatRequest) -> None:
    """Raises ApiError if one field would override another."""
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens")


def check_completion(request: CompletionRequest) -> None:
    """Raises ApiError if one field would override another."""
    if request.echo and request.suffix is not None:
        raise ApiError(
            400, "echo and suffix cannot be combined: the answer goes between prompt and suffix", param="echo"
        )
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise ApiError(
            400, "best_of must equal n: answers are not ranked; request n answers and choose", param="best_of"
        )


# ---- tools ----


def offered_tools(request: ChatRequest) -> list[Tool] | None:
    """The tools the model is told about."""
    if request.tool_choice == "none" or not request.tools:
        if request.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return None
    return request.tools


def forced_tools(request: ChatRequest, tools: list[Tool] | None) -> list[Tool] | None:
    """The tools one of which the model must call; None if it may answer instead."""
    if tools is None or request.tool_choice in (None, "auto"):
        return None
    if request.structured_outputs:
        message = "structured_outputs and tool_choice cannot be combined: the output is a call; leave one out"
        raise ApiError(400, message, param="structured_outputs")
    if not isinstance(request.tool_choice, NamedTool):
        return tools
    name = request.tool_choice.function.name
    named = [tool for tool in tools if tool.function.name == name]
    if not named:
        raise ApiError(400, f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
    return named[:1]


def call_form(tools: Sequence[Tool]) -> Form:
    """The form of a forced call: the arguments of a single tool, or {"name", "arguments"} for one of several.

    `ForcedCallParser` reads both.
    """
    if len(tools) == 1:
        return Form("tool_choice", Guide.json_schema(_parameters(tools[0])))
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": _rebased(_parameters(tool), f"#/anyOf/{place}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, tool in enumerate(tools)
    ]
    return Form("tool_choice", Guide.json_schema({"anyOf": calls}))


def form_or_calls(
    form: Form, tools: Sequence[Tool], written: ToolFormat | None, parallel: bool, tokenizer: Tokenizer
) -> Form:
    """The form, or calls in the model's syntax, each with arguments that fit its tool.

    Raises:
        ApiError: the form is not JSON, or the model's syntax for calls is unknown.
    """
    if form.guide.kind != "json_schema" or written is None:
        message = f"{form.option} and tools cannot be combined here; leave one out, or set tool_choice to none"
        raise ApiError(400, message, param=form.option)
    try:
        schema = json.loads(form.guide.source)
    except ValueError:
        raise ApiError(400, f"{form.option} holds a schema that is not JSON", param=form.option) from None
    header, index = written.header, ""
    if header.endswith(":0"):  # Kimi numbers its calls
        header, index = header[:-1], "/[0-9]{1,3}/"
    rules = []
    for place, tool in enumerate(tools):
        begin = _terms(tokenizer, written.call_begin + header.format(name=tool.function.name))
        arguments = f"{_terms(tokenizer, written.arguments_begin)} {_json_rule(_parameters(tool))}"
        end = _terms(tokenizer, written.arguments_end + written.call_end)
        rules.append(f"call{place}: {begin} {index} {arguments} {end}")
    begin, end = _terms(tokenizer, written.section_begin), _terms(tokenizer, written.section_end)
    more = '("\\n"? call)*' if parallel else ""
    lines = ["start: form | calls", f"form: {_json_rule(schema)}", f"calls: {begin} call {more} {end}"]
    lines += ["call: " + " | ".join(f"call{place}" for place in range(len(tools))), *rules]
    return replace(form, guide=Guide.grammar("\n".join(lines)))


def _parameters(tool: Tool) -> Object:
    """The schema of a tool's arguments, always an object; without parameters, only the empty object fits."""
    parameters = tool.function.parameters
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if parameters.get("type", "object") != "object":
        raise ApiError(400, f"parameters of {tool.function.name!r} must be a schema of an object", param="tools")
    return {"type": "object"} | parameters


def _rebased(schema: Any, root: str) -> Any:
    """A schema for use inside another one: its references start at `root`."""
    if isinstance(schema, list):
        return [_rebased(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _rebased(value, root) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved


def _json_rule(schema: Any) -> str:
    if isinstance(schema, dict):
        schema = schema | {"x-guidance": JSON_OPTIONS}
    return f"%json {json.dumps(schema)}"


def _terms(tokenizer: Tokenizer, text: str) -> str:
    """A text as Lark terms: added tokens by id, the rest as strings."""
    terms: list[str] = []
    plain: list[int] = []
    for token in [*tokenizer.encode(text, add_special_tokens=False), None]:
        if token is not None and token not in tokenizer.added_ids:
            plain.append(token)
            continue
        if plain:
            terms.append(json.dumps(tokenizer.decode(plain), ensure_ascii=False))
            plain = []
        if token is not None:
            terms.append(f"<[{token}]>")
    return " ".join(terms)
