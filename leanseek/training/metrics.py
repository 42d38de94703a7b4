"""The output of a running training: metrics.jsonl, TensorBoard, the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from leanseek.errors import InputError
from leanseek.reading import Count, Structure, checked, parse_json, read_bytes
from leanseek.writing import replace_file

SAMPLES = "samples.jsonl"  # in a run's folder: rows of step, prompt and answer
_LARGEST = 2**31  # bytes; a row has about 1000
_SAY_EVERY = 30  # seconds between progress lines when there is no terminal for a bar


class _Row(Structure):
    """A row: its step, and numbers by name, possibly in lists."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | str | list[Any] | dict[str, Any] | bool | None]
    step: Count
    event: str | None = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl. A last line that a kill truncated is skipped.

    Raises:
        InputError: another line is not a row; the message names it.
    """
    if not os.path.lexists(path):
        return []
    *lines, rest = read_bytes(path, limit=_LARGEST).split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        rows.append(parse_json(line, where))
        checked(_Row, rows[-1], where)
    with contextlib.suppress(InputError):  # truncated, or complete but for its newline
        row = parse_json(rest, str(path))
        checked(_Row, row, str(path))
        rows.append(row)
    return rows


class Metrics:
    """Appends one JSON object per line, mirrors its numbers to TensorBoard, and draws the bar on stderr.

    Rows after `start`, the step from which the run continues, are removed first; the run will write them again.
    """

    def __init__(self, folder: Path, steps: int, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= start] if start else []
        replace_file(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.last = {key: value for row in kept for key, value in row.items()}  # the newest value of every key
        self.file = self.path.open("a", encoding="utf-8")
        self.folder = os.open(folder, os.O_RDONLY)
        self.board = SummaryWriter(f"{self._utf8_name(folder)}/tensorboard", purge_step=start + 1 if start else None)
        self.said = time.monotonic()
        self.began = time.monotonic() - self.last.get("elapsed_s", 0.0)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task(escape(folder.name), total=steps, completed=start, figures="")

    def __enter__(self) -> Metrics:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()
        self.file.close()
        self.board.close()
        os.close(self.folder)

    def _utf8_name(self, folder: Path) -> str:
        """A path of the folder for TensorBoard, which encodes paths as UTF-8 in every locale."""
        same = str(folder).encode("utf-8", "replace") == os.fsencode(folder)
        return str(folder) if same else f"/proc/self/fd/{self.folder}"

    @property
    def elapsed(self) -> float:
        """Seconds that this run has trained, including those before it was resumed."""
        return time.monotonic() - self.began

    def write(self, row: dict[str, Any]) -> None:
        """Write a row; NaN and infinity become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()
        self.last |= clean
        for key, value in clean.items():
            if isinstance(value, int | float) and key not in ("step", "tokens"):
                self.board.add_scalar(key, value, row["step"])

    def sync(self) -> None:
        """Sync the rows so far to disk."""
        os.fsync(self.file.fileno())

    def event(self, step: int, event: str, message: str) -> None:
        """Write a row for an event, and print its message."""
        self.write({"step": step, "event": event, "message": message})
        self.say(message)

    def show(self, step: int, figures: str) -> None:
        self.progress.update(self.task, completed=step, figures=figures)
        if not self.progress.console.is_terminal and time.monotonic() - self.said > _SAY_EVERY:
            self.said = time.monotonic()
            self.say(f"step {step}: {figures}")

    def say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Silent(Metrics):
    """The output of a rank that has none: the first one's is the run's."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self.began = time.monotonic()

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, row: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def show(self, step: int, figures: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass
