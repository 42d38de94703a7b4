"""What crosses the edge of the process as text: arguments and standard input in, lines to a terminal out."""

from __future__ import annotations

import contextlib
import io
import sys

from leanseek.errors import InputError
from leanseek.reading import shorten

_LONGEST = 1000  # characters of an error's line


def prepare() -> None:
    """Whatever the locale: what cannot be written is escaped, and bytes that are read survive until `given_text`."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def given_text(text: str, what: str = "the prompt") -> str:
    """An argument or input: bytes that the locale's encoding does not have are taken as UTF-8.

    Raises:
        InputError: they are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise InputError(f"{what} is not text: its bytes are not UTF-8") from None


def shown(text: str) -> str:
    """A model's text for standard output: in a terminal, control characters are spelled, so that they move nothing."""
    with contextlib.suppress(ValueError):  # a closed stream
        if sys.stdout.isatty():
            return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return text


def report(error: Exception) -> None:
    """An error's one line on standard error."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"leanseek: {shorten(str(error), _LONGEST)}", file=sys.stderr)
