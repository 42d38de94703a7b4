"""Prompts to answer: rows of JSON lines or parquet with `prompt` or `messages`, and whatever columns a reward reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from leanseek.data.formats import DataError
from leanseek.posttraining.rows import read_rows
from leanseek.reading import shorten

Message = Mapping[str, Any]
_OWN = ("prompt", "messages", "completion")  # keys that are no columns of rewards


class Prompt(NamedTuple):
    """prompt: a text, or messages up to the user's last. original: the answer that the row brings, if any."""

    prompt: str | list[dict[str, Any]]
    original: str | None
    columns: dict[str, Any]


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file.

    `{"prompt": text or messages, "completion"?, ...columns}`, as TRL's and verl's rows, or `{"messages", ...columns}`,
    where a last message of the assistant is the original answer.

    Raises:
        DataError: the file cannot be read, or a row has no prompt; the message names the row. Or rows have different
            columns.
    """
    prompts = [_prompt(row, where) for row, where in read_rows(path)]
    if not prompts:
        raise DataError(f"{path} has no rows")
    names = prompts[0].columns.keys()
    for number, prompt in enumerate(prompts, 1):
        if odd := sorted(prompt.columns.keys() ^ names):
            raise DataError(f"{path}: column {odd[0]!r} is in some rows and not in others, such as row {number}")
    return prompts


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    columns = {key: value for key, value in row.items() if key not in _OWN}
    if "prompt" in row:
        prompt, original = row["prompt"], row.get("completion")
        if not isinstance(prompt, str):
            _check_messages(prompt, where, "prompt")
        if original is not None and not isinstance(original, str):
            _check_messages(original, where, "completion")
            original = original[-1]["content"]
        return Prompt(prompt, original, columns)
    if "messages" not in row:
        raise DataError(f"{where} has neither prompt nor messages; it has {shorten(', '.join(row) or 'nothing')}")
    messages, original = row["messages"], None
    _check_messages(messages, where, "messages")
    if messages[-1]["role"] == "assistant":
        messages, original = messages[:-1], messages[-1]["content"]
    if not messages:
        raise DataError(f"{where}: messages holds an answer alone")
    return Prompt(messages, original, columns)


def _check_messages(messages: object, where: str, key: str) -> None:
    whole = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not whole or not messages:
        raise DataError(f"{where}: {key} must be a text or a list of messages with role and content")
