"""A prompt and its answer as the ids that a model would have been sent and have written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leanseek.engine import Tokenizer
from leanseek.errors import InputError
from leanseek.posttraining.prompts import Message
from leanseek.server.templates import load_chat_template
from leanseek.tokens import special_tokens


class Answers:
    """Encodes with the tokenizer and the chat template in a folder."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer(folder)
        self.special = special_tokens(self.tokenizer.inner, folder)
        bos = self.special.bos
        self.template = load_chat_template(folder, "" if bos is None else self.tokenizer.inner.id_to_token(bos) or "")

    def ids(self, prompt: str | Sequence[Message], completion: str | Sequence[Message]) -> list[int]:
        """The prompt, rendered if it is messages, the answer's text, and the end token."""
        text = completion if isinstance(completion, str) else _text(completion)
        if isinstance(prompt, str):
            before = self.tokenizer.encode(prompt)
        else:
            rendered = self.template.render(list(prompt))
            if rendered.rstrip().endswith("<think>"):  # opened by the template; the answer may open it too
                text = text.removeprefix("<think>").lstrip("\n") if text.startswith("<think>") else text
            before = self.tokenizer.encode(rendered, add_special_tokens=False)
        return [*before, *self.tokenizer.encode(text, add_special_tokens=False), self.special.eos[0]]

    def close(self) -> None:
        self.template.close()


def _text(messages: Sequence[Any]) -> str:
    if len(messages) != 1 or not isinstance(messages[0].get("content"), str):
        raise InputError("an answer is a text or one message of the assistant")
    return str(messages[0]["content"])
