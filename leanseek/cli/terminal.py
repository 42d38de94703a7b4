"""What crosses the edge of the process as text: arguments and standard input in, lines to a terminal out."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings

from leanseek.errors import InputError
from leanseek.reading import shorten

_LONGEST = 1000  # characters of an error's line


def prepare() -> None:
    """Whatever the locale: what cannot be written is escaped, and bytes that are read survive until `given_text`."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if logging.lastResort:  # what writes the log where nobody set one up
        logging.lastResort.setFormatter(_LogFormat())
    warnings.formatwarning = lambda message, *_, **__: f"leanseek: {spelled(str(message))}\n"


def given_text(text: str, what: str = "the prompt") -> str:
    """An argument or input: bytes that the locale's encoding does not have are taken as UTF-8.

    Raises:
        InputError: they are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise InputError(f"{what} is not text: its bytes are not UTF-8") from None


def spelled(text: str, kept: str = "") -> str:
    """A text whose control characters, but for those kept, are spelled (`\\x1b`), so that they move nothing."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """A model's text for standard output: spelled in a terminal, as it is in a file."""
    with contextlib.suppress(ValueError):  # a closed stream
        if sys.stdout.isatty():
            return spelled(text, "\n\t")
    return text


class _LogFormat(logging.Formatter):
    """Spelled, and further lines indented: what clients and files say forges no entry."""

    def format(self, record: logging.LogRecord) -> str:
        return spelled(super().format(record), "\n").replace("\n", "\n    ")


def report(error: Exception) -> None:
    """An error's one line on standard error."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"leanseek: {shorten(str(error), _LONGEST)}", file=sys.stderr)
