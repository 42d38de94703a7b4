"""Renders messages into the prompt format that a model was trained on.

A template in the model's folder wins; otherwise the tokens in the tokenizer identify one of the published formats. A
folder's template is untrusted code: it runs sandboxed in a process of its own, without access to files, with limits on
time, memory and output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from pydantic import Field

from leanseek.config import ModelConfig
from leanseek.engine import Confined, Overtaxed, Tokenizer
from leanseek.errors import InputError
from leanseek.reading import Structure, check_links, checked, read_optional_json, read_text
from leanseek.server import jinja_worker
from leanseek.server.parsers import DEEPSEEK_V3_TOOLS, DEEPSEEK_V31_TOOLS, KIMI_K2_TOOLS, THINK, ToolFormat
from leanseek.tokens import Added, Names, named

RENDER_TIMEOUT_S = 5.0
MAX_TEMPLATE = 1_000_000  # characters
_CUT = "\ue000continued\ue000"  # marks the end of an answer to continue while it is rendered: private-use characters

Message = Mapping[str, Any]


class TemplateError(InputError):
    """The chat template is broken, or refuses the messages."""


class _Spec(Structure):
    """What we read of a tokenizer.json, besides what the tokenizers library reads."""

    added_tokens: list[Added] = Field(default_factory=list)


@dataclass(frozen=True)
class Family:
    """A published chat format, recognised by tokens that only its tokenizers have."""

    name: str
    tokens: frozenset[str]
    template: str
    variables: dict[str, Any] = field(default_factory=dict)
    tools: ToolFormat | None = None
    stop: tuple[str, ...] = ()  # strings that begin another speaker's turn


# The first family whose tokens are all in the tokenizer wins.
_FAMILIES = (
    Family("kimi-k2", frozenset({"<|im_middle|>"}), "kimi_k2", tools=KIMI_K2_TOOLS),
    Family(
        "deepseek-v3.1",
        frozenset({"<｜User｜>", THINK, "<｜search▁begin｜>"}),
        "deepseek_v31",
        {"thinking": False},
        DEEPSEEK_V31_TOOLS,
    ),
    Family("deepseek-r1", frozenset({"<｜User｜>", THINK}), "deepseek_v3", {"r1": True}, DEEPSEEK_V3_TOOLS),
    Family("deepseek-v3", frozenset({"<｜User｜>"}), "deepseek_v3", {"r1": False}, DEEPSEEK_V3_TOOLS),
    Family("plain", frozenset(), "plain", stop=("\nUser:",)),
)


class ChatTemplate:
    """Renders a model's conversations.

    Args:
        tokens: special tokens of its tokenizer
        source: the folder's template, if it has one

    source: the template as a file for a folder, which writes the same
    takes_parts: whether the template reads a message's content as a list of parts instead of a text

    Raises:
        TemplateError: the source is not a template.
    """

    def __init__(self, tokens: Collection[str], source: str | None = None, bos_token: str = "", eos_token: str = ""):
        self.family = next(family for family in _FAMILIES if family.tokens <= set(tokens))
        self.reasons = THINK in tokens  # whether the model may think before it answers
        self.stop = self.family.stop if source is None else ()
        self._confined: _ConfinedTemplate | None = None
        self._defaults: dict[str, Any] = {"bos_token": bos_token, "eos_token": eos_token}
        if source is None:
            self._defaults |= self.family.variables
            path = Path(__file__).parent / "chat_templates" / f"{self.family.template}.jinja"
            text = path.read_text(encoding="utf-8")
            template = jinja_worker.Template(text)
            fixed = (f"{{%- set {name} = true -%}}\n" for name, value in self.family.variables.items() if value)
            self.source = "".join(fixed) + text
            self._render, self._reads, self.takes_parts = template.render, template.variables, False
            return
        self.source = source
        confined = self._confined = _ConfinedTemplate(source)
        self._render, self._reads, self.takes_parts = confined.render, confined.variables, confined.takes_parts

    def close(self) -> None:
        """End the processes of a folder's template."""
        if self._confined:
            self._confined.close()

    @property
    def thinking_switch(self) -> bool:
        """Whether the template has a variable that turns thinking on (V3.1)."""
        return "thinking" in self._reads

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt, special tokens included.

        Args:
            messages: with `role`, `content` (a string, None, or a list if the template `takes_parts`) and, as in
                OpenAI's API, `tool_calls`, `tool_call_id`; the template gets other fields unchanged
            tools: with `function`: `name`, `description`, `parameters`
            variables: for the template, such as `thinking`
            add_generation_prompt: end where the model's answer begins
            continue_final_message: end where the last message's text ends instead, without closing the message

        Raises:
            TemplateError: the template refuses the messages, takes too long, or cannot write tools.
            Crowded: too many slow templates are being rendered.
        """
        if continue_final_message:
            messages = [*messages[:-1], _marked(messages[-1])]
        if tools and "tools" not in self._reads:  # published templates of V3, R1 and V3.1 leave tools to the caller
            if self.family.tools is None:
                raise TemplateError("this model's chat format has no tools")
            messages, tools = _with_tools(messages, tools, self.family.tools), None
        add = add_generation_prompt and not continue_final_message
        own = {"messages": messages, "tools": tools, "add_generation_prompt": add}
        try:
            text = self._render({**self._defaults, **(variables or {}), **own})
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TemplateError(f"the chat template refuses these messages: {error}") from None
        if not continue_final_message:
            return text
        prompt, mark, _ = text.rpartition(_CUT)
        if not mark:
            raise TemplateError(
                "the chat template changes the text of the last message, so the answer cannot continue it"
            )
        return prompt


def _marked(message: Message) -> dict[str, Any]:
    """The message as the start of an answer: with a mark after its text, and the `prefix` of DeepSeek's templates."""
    content = message.get("content") or ""
    marked = [*content, {"type": "text", "text": _CUT}] if isinstance(content, list) else content + _CUT
    return {**message, "content": marked, "prefix": True}


class _ConfinedTemplate:
    """A template in processes of its own.

    It is compiled there too, because Jinja evaluates constant expressions when it compiles.

    Raises:
        TemplateError: the source is not a template.
    """

    def __init__(self, source: str):
        if len(source) > MAX_TEMPLATE:
            raise TemplateError(f"the chat template has more than {MAX_TEMPLATE:,} characters")
        try:
            self._confined = Confined(jinja_worker.__file__, source, RENDER_TIMEOUT_S)
            reads = self._answer(self._confined.opened)
            self.variables, self.takes_parts = frozenset(reads["variables"]), bool(reads["takes_parts"])
        except (Overtaxed, TemplateError) as error:
            reason = error if isinstance(error, TemplateError) else _too_much()
            raise TemplateError(f"the chat template is not valid Jinja: {reason}") from None

    def render(self, variables: dict[str, Any]) -> str:
        """Raises TemplateError, Crowded."""
        try:
            return str(self._answer(self._confined.ask(variables))["text"])
        except Overtaxed:
            raise TemplateError(_too_much()) from None

    def close(self) -> None:
        self._confined.close()

    @staticmethod
    def _answer(answer: dict[str, Any]) -> dict[str, Any]:
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer


def _too_much() -> str:
    return f"it took more than {RENDER_TIMEOUT_S:g} s, or too much memory"


def _with_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], form: ToolFormat
) -> list[dict[str, Any]]:
    """The messages with the tools described at the end of the system message, under V3.1's headings."""
    described = ["## Tools\nYou have access to the following tools:"]
    for tool in tools:
        function = tool["function"]
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        described.append(
            f"### {function['name']}\nDescription: {function.get('description') or ''}\n\nParameters: {parameters}"
        )
    described.append(
        "To call a tool, write exactly this, with arguments that are JSON and fit its parameters; "
        f"several calls follow each other within one section:\n{form.example('NAME', 'ARGUMENTS')}"
    )
    text = "\n\n".join(described)
    first, rest = dict(messages[0]), [dict(message) for message in messages[1:]]
    if first["role"] != "system":
        return [{"role": "system", "content": text}, first, *rest]
    if isinstance(first["content"], list):
        return [first | {"content": [*first["content"], {"type": "text", "text": f"\n\n{text}"}]}, *rest]
    return [first | {"content": f"{first['content']}\n\n{text}"}, *rest]


def load_chat_template(
    source: Path | Mapping[str, Any], bos_token: str = "", file: Path | None = None, allow_links: bool = False
) -> ChatTemplate:
    """The chat template of a model folder, or of the contents of a tokenizer_config.json.

    Args:
        bos_token: used if the folder does not name one
        file: a template to use instead of the folder's
        allow_links: follow links out of the folder

    Raises:
        TemplateError: a file is malformed, or links out of the folder.
    """
    config: dict[str, Any] = {}
    tokens: set[str] = set()
    text: str | None = None
    if isinstance(source, Path):
        if not allow_links:
            check_links(source, TemplateError)
        config = read_optional_json(source / "tokenizer_config.json", TemplateError)
        spec, where = read_optional_json(source / "tokenizer.json", TemplateError), str(source / "tokenizer.json")
        tokens = {token.content for token in checked(_Spec, spec, where, TemplateError).added_tokens}
        own = source / "chat_template.jinja"
        text = read_text(own, TemplateError, 4 * MAX_TEMPLATE) if os.path.lexists(own) else None
    else:
        config = dict(source)
    checked(
        Names, config, f"{source}/tokenizer_config.json" if isinstance(source, Path) else "the tokenizer_config.json"
    )
    tokens |= {token["content"] for token in config.get("added_tokens_decoder", {}).values()}
    if file is not None:
        text = _read_template(file)
    if text is None:
        text = _default_template(config.get("chat_template"))
    return ChatTemplate(tokens, text, _token(config, "bos_token") or bos_token, _token(config, "eos_token"))


def render_chat(
    source: Path | Mapping[str, Any],
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """`load_chat_template(source).render(...)`, to render once; `thinking` is V3.1's switch."""
    variables = {} if thinking is None else {"thinking": thinking}
    return load_chat_template(source).render(messages, tools, variables, add_generation_prompt)


def template_of(tokenizer: Tokenizer, config: ModelConfig, file: Path | None = None) -> ChatTemplate:
    """`load_chat_template` for a loaded model."""
    bos = config.bos_token_id
    bos_token = "" if bos is None else tokenizer.token_bytes(bos).decode(errors="replace")
    # Links were checked when the model was loaded.
    return load_chat_template(tokenizer.file.parent, bos_token, file, allow_links=True)


def _read_template(file: Path) -> str:
    if not file.is_file():
        raise TemplateError(f"{file} is not a file; --chat-template takes a Jinja template")
    return read_text(file, TemplateError, 4 * MAX_TEMPLATE)


def _token(config: Mapping[str, Any], name: str) -> str:
    return named(config.get(name)) or ""


def _default_template(value: Any) -> str | None:
    """`chat_template` of a tokenizer_config.json: a template, or a list of named ones."""
    if isinstance(value, list):
        return next((item["template"] for item in value if item["name"] == "default"), None)
    return value
