"""Rows of chats -> token ids and which of them are learned: what the model itself would have been prompted with, then
its answer and the end token.

Each answer follows the very ids with which a server prompts for it: the chat rendered up to there by the model's own
template. Where a later prompt does not continue an earlier one (R1 leaves the thoughts of past turns out), each answer
becomes a sample of its own. The text of an answer is the row's: a template that hides `<think>`, or opens it in the
prompt, neither hides nor doubles it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from leanseek.data.formats import DataError
from leanseek.engine import Tokenizer
from leanseek.errors import InputError
from leanseek.posttraining.rows import Row
from leanseek.reading import shorten
from leanseek.server.templates import TemplateError, load_chat_template
from leanseek.tokens import special_tokens

THINK, THOUGHT = "<think>", "</think>"
Message = dict[str, Any]
_PROBE = "\ue001"  # an answer that no template changes


class Sample(NamedTuple):
    """Token ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


class Chats:
    """Turns rows into samples with the tokenizer and the chat template in a folder. Without a template there, it is
    that of V3, R1 or V3.1 where the tokenizer has their tokens, else a plain script of two speakers.

    Raises:
        InputError: the tokenizer or the template cannot be used, or the template's end of an answer ends nothing.
    """

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer(folder)
        self.special = special_tokens(self.tokenizer.inner, folder)
        self.bos = "" if self.special.bos is None else self._name(self.special.bos)
        self.template = load_chat_template(folder, self.bos)
        self.end = self._end(folder)

    def close(self) -> None:
        self.template.close()

    def _name(self, token: int) -> str:
        return self.tokenizer.inner.id_to_token(token) or ""

    def _end(self, folder: Path) -> int:
        """The token that ends an answer: the first special one that the template writes after it."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        closing = self.template.render(chat, add_generation_prompt=False).rpartition(_PROBE)[2]
        found = next((i for i in self._ids(closing) if i in self.tokenizer.special_ids), self.special.eos[0])
        if found not in self.special.eos:
            raise DataError(
                f"{folder}: the chat template ends an answer with {self._name(found)}, which ends no text; name it as "
                "eos_token, or among eos_token_id in a generation_config.json"
            )
        return found

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def samples(self, row: Row, place: str) -> list[Sample]:
        """The samples of `{"messages"}` or of `{"prompt", "completion"}`, both as messages or both as plain text, which
        no template surrounds.

        Raises:
            DataError: the row is neither, or nothing in it is learned; the message names it.
        """
        try:
            if "messages" in row:
                found = self._chat(_messages(row["messages"]), 0)
            else:
                found = self.answered(*_parts(row, "prompt", "completion"))
        except InputError as error:
            raise DataError(f"{place}: {error}") from None
        if not any(any(sample.learned) for sample in found):
            raise DataError(f"{place}: no turn of an assistant, so nothing would be learned; leave the row out")
        return found

    def answered(self, prompt: str | list[Message], completion: str | list[Message]) -> list[Sample]:
        """The samples of a prompt and its completion, of which alone something is learned."""
        if isinstance(prompt, list):
            answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            return self._chat(_messages(prompt) + _messages(answer), len(prompt))
        if not isinstance(completion, str):
            raise DataError("prompt is a text, so completion must be one")
        leading = list(self.special.leading)
        ids = leading + self._ids(prompt.removeprefix(self.bos) if leading else prompt)
        return [_sample(ids, [*self._ids(completion), self.special.eos[0]])]

    def prompt(self, prompt: str | list[Message]) -> list[int]:
        """What a server would be sent for it."""
        if isinstance(prompt, str):
            return self.answered(prompt, "")[0].ids[:-1]
        return self._ids(self.template.render(_messages(prompt)))

    def _chat(self, messages: list[Message], first: int) -> list[Sample]:
        """The answers among messages[first:]."""
        done: list[Sample] = []
        for place in range(first, len(messages)):
            if messages[place]["role"] != "assistant":
                continue
            prompt, answer = self._turn(messages[: place + 1])
            ids, answered = self._ids(prompt), [*self._ids(answer), self.end]
            before = done[-1].ids if done else []
            if done and ids[: len(before)] == before:  # it goes on from the answer before
                more = _sample(ids, answered)
                done[-1] = Sample(more.ids, done[-1].learned + more.learned[len(before) :])
            else:
                done.append(_sample(ids, answered))
        return done

    def _turn(self, messages: list[Message]) -> tuple[str, str]:
        """The prompt for the last message, and its text as it goes on from there."""
        answer, before = dict(messages[-1]), messages[:-1]
        variables = {}
        if answer.get("tool_calls"):
            return self._calls(messages)
        content = _with_thoughts(answer)
        if self.template.thinking_switch:  # the prompt of V3.1 says whether there are thoughts
            variables = {"thinking": content.startswith(THINK)}
            content = content.removeprefix(THINK)
        prompt = self.template.render(before, variables=variables)
        answer["content"] = content
        try:
            text = self.template.render([*before, answer], variables=variables, continue_final_message=True)
        except TemplateError:  # it changes the text
            text = ""
        if text.startswith(prompt) and text.endswith(content):
            return prompt, text[len(prompt) :]
        if not prompt.rstrip().endswith(THINK) or self.template.thinking_switch:
            return prompt, content
        if not content.startswith(THINK):  # thoughts that the prompt begins end at once
            return prompt, f"\n{THOUGHT}\n\n{content}"
        opened = content.removeprefix(THINK)
        return prompt, opened.lstrip("\n") if prompt.endswith("\n") else opened

    def _calls(self, messages: list[Message]) -> tuple[str, str]:
        """Of an answer with tool calls, which the template spells."""
        prompt = self.template.render(messages[:-1])
        text = self.template.render(messages, add_generation_prompt=False)
        end = self._name(self.end)
        if not text.startswith(prompt) or end not in text[len(prompt) :]:
            raise DataError("the chat template does not write tool calls where the answer begins")
        return prompt, text[len(prompt) :].rpartition(end)[0]


def _sample(prompt: list[int], answer: list[int]) -> Sample:
    """Nothing predicts the first token of all."""
    learned = [False] * len(prompt) + [True] * len(answer)
    return Sample(prompt + answer, [False, *learned[1:]])


def _with_thoughts(answer: Message) -> str:
    """The text of an answer; a `reasoning_content` beside it comes first, in its tags."""
    content, thoughts = answer.get("content") or "", answer.get("reasoning_content")
    return content if not thoughts else f"{THINK}\n{thoughts}\n{THOUGHT}\n\n{content}"


def _parts(row: Row, *keys: str) -> Iterator[Any]:
    for key in keys:
        if not isinstance(row.get(key), str | list):
            has = shorten(", ".join(row)) or "nothing"
            raise DataError(f"neither messages nor {' and '.join(keys)}, as texts or messages; it has {has}")
        yield row[key]


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError("messages must be a list of messages, not empty")
    found = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError("each message must have a role and a content")
        kept = {key: part for key, part in message.items() if part is not None}  # parquet fills in nulls
        if not isinstance(kept.setdefault("content", "" if kept.get("tool_calls") else None), str):
            raise DataError(f"a message of role {shorten(message['role'])} has no text as its content")
        found.append(kept)
    return found
