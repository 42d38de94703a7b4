"""Rows of preferences -> pairs of samples."""

from __future__ import annotations

from leanseek.data.formats import DataError
from leanseek.errors import InputError
from leanseek.posttraining.chat import Chats, Sample
from leanseek.posttraining.rows import Row


def pair(chats: Chats, row: Row, place: str) -> list[Sample]:
    """The chosen answer and the rejected one of `{"prompt", "chosen", "rejected"}`, each after the prompt.

    Raises:
        DataError: something is missing; the message names the row.
    """
    try:
        each = [chats.answered(row["prompt"], row[key]) for key in ("chosen", "rejected")]
    except KeyError:
        raise DataError(f"{place}: has chosen and rejected, but no prompt") from None
    except InputError as error:
        raise DataError(f"{place}: {error}") from None
    if not all(len(samples) == 1 for samples in each):
        raise DataError(f"{place}: chosen and rejected must be one answer each")
    return [samples[0] for samples in each]
