"""Text at the process boundary: arguments and standard input come in, lines for a terminal go out."""

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
    """Work in any locale: escape output that it cannot encode, and keep input bytes intact until `given_text`."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if logging.lastResort:  # the handler in use if nobody configured logging
        logging.lastResort.setFormatter(_LogFormat())
    warnings.formatwarning = lambda message, *_, **__: f"leanseek: {spelled(str(message))}\n"


def given_text(text: str, what: str = "the prompt") -> str:
    """An argument or input as text: bytes outside the locale's encoding are read as UTF-8.

    Raises:
        InputError: these bytes are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise InputError(f"{what} is not text: its bytes are not UTF-8") from None


def spelled(text: str, kept: str = "") -> str:
    """A text with its control characters spelled out (`\\x1b`), except those in `kept`, so a terminal ignores them."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """A model's text for standard output: spelled out for a terminal, unchanged for a file."""
    with contextlib.suppress(ValueError):  # a closed stream
        if sys.stdout.isatty():
            return spelled(text, "\n\t")
    return text


class _LogFormat(logging.Formatter):
    """Spells out control characters and indents further lines, so text from clients or files cannot forge entries."""

    def format(self, record: logging.LogRecord) -> str:
        return spelled(super().format(record), "\n").replace("\n", "\n    ")


def report(error: Exception) -> None:
    """Print an error as one line on standard error."""
    with contextlib.suppress(OSError):  # standard error is closed
        print(f"leanseek: {shorten(str(error), _LONGEST)}", file=sys.stderr)
