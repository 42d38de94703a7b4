"""`leanseek convert`: BF16 to FP8 and back, streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leanseek.cli.generate import AllowLinks, AllowNonfinite


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A Hugging Face folder or a run.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="bf16, or fp8: 128×128 blocks, as DeepSeek publishes.")],
    allow_links: AllowLinks = False,
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Rewrite a checkpoint's weights in BF16 or FP8, one tensor at a time."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from leanseek import checkpoint
    from leanseek.reading import shorten

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("")
        left = checkpoint.convert(
            source,
            out,
            to,
            lambda done, total: bar.update(task, completed=done, total=total),
            allow_links=allow_links,
            allow_nonfinite=allow_nonfinite,
        )
    console.print(f"wrote {shorten(str(out), 1000)}", markup=False, soft_wrap=True)
    for line in left:
        console.print(f"left out: {shorten(line, 1000)}", markup=False, soft_wrap=True)
