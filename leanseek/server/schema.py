"""Request bodies: OpenAI's fields, and vLLM's extra fields under vLLM's names.

Types are strict and numbers finite. The engine checks the ranges of sampling parameters; the bounds here only keep
numbers representable. Each of OpenAI's fields is honoured, `Ignored` if nothing is lost by that, or `refused` by name.
Unknown fields are ignored, as in other OpenAI-compatible servers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, Tag
from pydantic_core import PydanticCustomError

Int = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
MOST_TOKENS = 2**20  # per text: more than any context
Tokens = Annotated[list[TokenId], Field(max_length=MOST_TOKENS)]
Object = dict[str, JsonValue]


Ignored = JsonValue  # for fields that can be ignored without changing the answer


def refused(why: str, *harmless: JsonValue) -> AfterValidator:
    """Marks an unsupported field: only null or a `harmless` value passes. `why` tells the client what to do."""

    def check(value: JsonValue) -> JsonValue:
        if value is not None and value not in harmless:
            raise PydanticCustomError("refused", "this server does not support it; {why}", {"why": why})
        return value

    return AfterValidator(check)


class Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class Verbatim(Body):
    """A part of a conversation. The chat template gets it unchanged, unknown fields included."""

    model_config = ConfigDict(extra="allow")

    def given(self) -> Object:
        """What the client sent; null means absent."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


# ---- sampling ----


class StructuredOutputs(Body):
    """The form that the output must have; exactly one field is set."""

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
    # OpenAI's, ignored
    user: Ignored = None
    # vLLM's
    guided_json: Annotated[JsonValue, refused("use structured_outputs")] = None
    guided_regex: Annotated[JsonValue, refused("use structured_outputs")] = None
    guided_choice: Annotated[JsonValue, refused("use structured_outputs")] = None
    guided_grammar: Annotated[JsonValue, refused("use structured_outputs")] = None
    allowed_token_ids: Annotated[JsonValue, refused("use structured_outputs or logit_bias")] = None
    bad_words: Annotated[JsonValue, refused("use logit_bias", [])] = None
    use_beam_search: Annotated[JsonValue, refused("leave it out", False)] = None
    truncate_prompt_tokens: Annotated[JsonValue, refused("shorten the prompt yourself")] = None


class StreamOptions(Body):
    include_usage: bool | None = False  # in a last chunk without choices
    include_obfuscation: Ignored = None
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


class TextPart(Verbatim):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(Verbatim):
    type: Literal["refusal"]
    refusal: str


Content = str | list[TextPart | RefusalPart]


class FunctionCall(Verbatim):
    name: str
    arguments: str


class ToolCall(Verbatim):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Verbatim):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    prefix: bool | None = None  # DeepSeek's: the answer continues this message, which must be the last
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Annotated[JsonValue, refused("use tool_calls")] = None
    audio: Annotated[JsonValue, refused("send text")] = None


class Function(Verbatim):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    description: str | None = None
    parameters: Object | None = None


class Tool(Verbatim):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class Ending(Body):
    """How a conversation ends: where a new answer begins, or within an answer that the client has begun."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatRequest(Sampling, Ending):
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
    reasoning_effort: str | None = None  # for templates that read it
    chat_template_kwargs: Object | None = None
    # ignored
    metadata: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    verbosity: Ignored = None
    # not supported
    audio: Annotated[JsonValue, refused("answers are text")] = None
    modalities: Annotated[JsonValue, refused('answers are text: ["text"]', ["text"])] = None
    function_call: Annotated[JsonValue, refused("use tool_choice", "none")] = None
    functions: Annotated[JsonValue, refused("use tools", [])] = None
    moderation: Annotated[JsonValue, refused("nothing is moderated")] = None
    store: Annotated[JsonValue, refused("nothing is stored", False)] = None
    web_search_options: Annotated[JsonValue, refused("nothing is searched")] = None
    chat_template: Annotated[JsonValue, refused("start the server with --chat-template")] = None
    documents: Annotated[JsonValue, refused("use chat_template_kwargs", [])] = None
    echo: Annotated[JsonValue, refused("only the answer is returned", False)] = None
    prompt_logprobs: Annotated[JsonValue, refused("use /v1/completions with echo")] = None


# ---- completions ----


class CompletionRequest(Sampling):
    prompt: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1, max_length=1024)]
    suffix: str | None = None
    n: Int | None = None
    best_of: Int | None = None
    max_tokens: Count | None = None
    stream_options: StreamOptions | None = None
    logprobs: Count | None = None
    echo: bool | None = False
    prompt_logprobs: Annotated[JsonValue, refused("use echo with logprobs")] = None
    response_format: TextFormat | None = None


# ---- responses ----


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ReasoningPart(Body):
    text: str


class InputReasoning(Body):
    """An earlier response's reasoning; the chat template decides whether the model sees it again."""

    type: Literal["reasoning"]
    summary: list[ReasoningPart] | None = None
    content: list[ReasoningPart] | None = None


class InputCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


_ITEMS = ("message", "reasoning", "function_call", "function_call_output")


def _kind(value: Any, default: str | None = None) -> str:
    """The `type` of an item, which is a dict or already a model."""
    kind = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
    return str(kind)


def _known_item(value: Any) -> Any:
    if (kind := _kind(value, "message")) not in _ITEMS:
        message = "items of type {kind} are not supported; these are: {known}"
        raise PydanticCustomError("refused", message, {"kind": repr(kind[:64]), "known": ", ".join(_ITEMS)})
    return value


def _known_tool(value: Any) -> Any:
    if (kind := _kind(value)) != "function":
        message = "tools of type {kind} are not supported; function tools are"
        raise PydanticCustomError("refused", message, {"kind": repr(kind[:64])})
    return value


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputReasoning, Tag("reasoning")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")],
    Discriminator(lambda value: _kind(value, "message")),
    BeforeValidator(_known_item),
]


class FunctionTool(Body):
    """A tool in the flat form of /v1/responses."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class FunctionChoice(Body):
    type: Literal["function"]
    name: str


class ResponsesFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Object | None = Field(None, alias="schema")


class ResponsesText(Body):
    format: ResponsesFormat | None = None
    verbosity: Ignored = None


class Reasoning(Body):
    effort: str | None = None  # for templates that read `reasoning_effort`
    summary: Ignored = None  # the reasoning is returned whole


class ResponsesRequest(Sampling):
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: ResponsesText | None = None
    metadata: dict[str, str] | None = None
    tools: list[Annotated[FunctionTool, BeforeValidator(_known_tool)]] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = True
    reasoning: Reasoning | None = None
    chat_template_kwargs: Object | None = None
    # ignored
    max_tool_calls: Ignored = None  # applies to built-in tools only
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    stream_options: StreamOptions | None = None
    # not supported
    access_programs: Annotated[JsonValue, refused("leave it out")] = None
    background: Annotated[JsonValue, refused("wait for the answer, or stream it", False)] = None
    background_options: Annotated[JsonValue, refused("wait for the answer, or stream it")] = None
    context_management: Annotated[JsonValue, refused("send everything that the model should see as input", [])] = None
    conversation: Annotated[JsonValue, refused("nothing is stored: send the conversation as input")] = None
    image: Annotated[JsonValue, refused("input and output are text")] = None
    include: Annotated[
        JsonValue, refused("supported fields are always returned", [], ["reasoning.encrypted_content"])
    ] = None
    moderation: Annotated[JsonValue, refused("nothing is moderated")] = None
    previous_response_id: Annotated[JsonValue, refused("nothing is stored: send the conversation as input")] = None
    prompt: Annotated[JsonValue, refused("nothing is stored: send its text as instructions and input")] = None
    store: Annotated[JsonValue, refused("nothing is stored: send false, and the conversation each time", False)] = None
    top_logprobs: Annotated[JsonValue, refused("use /v1/chat/completions", 0)] = None
    truncation: Annotated[JsonValue, refused("shorten the input yourself", "disabled")] = None


# ---- tokens ----


class TokenizeRequest(Ending):
    """A text, or a conversation for the chat template to render."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: Object | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Tokens
