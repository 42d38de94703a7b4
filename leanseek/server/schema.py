"""What requests may hold: OpenAI's fields, and vLLM's extra ones under vLLM's names.

Types are strict and numbers finite. Ranges that matter to sampling are the engine's to check; here stand only the
bounds that keep a number representable. Fields nobody here knows are ignored, as OpenAI-compatible servers do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Int = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Object = dict[str, JsonValue]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


# ---- sampling ----


class StructuredOutputs(Body):
    """A form the output must have; exactly one is given."""

    json_: Object | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Sampling(Body):
    """Sampling parameters shared by every endpoint; unset ones come from the model's generation_config.json."""

    model: str | None = None
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Int = 0


class StreamOptions(Body):
    include_usage: bool | None = False  # in a last chunk without choices
    continuous_usage_stats: bool | None = False  # in every chunk


class JsonSchema(Body):
    name: str
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """`response_format` of chat and completions."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


# ---- chat ----


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Body):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    description: str | None = None
    parameters: Object | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    n: Int | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: Count | None = None
    response_format: TextFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: Object | None = None


# ---- completions ----


class CompletionRequest(Sampling):
    prompt: str | list[TokenId] | Annotated[list[str | list[TokenId]], Field(min_length=1, max_length=1024)]
    suffix: str | None = None
    n: Int | None = None
    best_of: Int | None = None
    max_tokens: Count | None = None
    stream_options: StreamOptions | None = None
    logprobs: Count | None = None
    echo: bool | None = False
    response_format: TextFormat | None = None


# ---- responses ----


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class InputReasoning(Body):
    """An earlier response's reasoning, which is not repeated to the model."""

    type: Literal["reasoning"]


class ResponsesFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Object | None = Field(None, alias="schema")


class ResponsesText(Body):
    format: ResponsesFormat | None = None


class ResponsesRequest(Sampling):
    input: str | Annotated[list[InputMessage | InputReasoning], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: ResponsesText | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: Object | None = None


# ---- tokens ----


class TokenizeRequest(Body):
    """A text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: Object | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]
