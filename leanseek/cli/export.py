"""`leanseek export`: write a run or a checkpoint in the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from leanseek.cli.generate import AllowLinks, AllowNonfinite


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run or a Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, or the .gguf file.")],
    format: Annotated[str, typer.Option(help="hf, hf-fp8 or gguf.")] = "hf",
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), or float32, bfloat16, float16; for gguf f32, bf16, f16, q8_0.")
    ] = "auto",
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json or its folder; by default the one beside the checkpoint.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="export the averaged weights of a run with optimizer.ema.")
    ] = False,
    allow_links: AllowLinks = False,
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Write a checkpoint for transformers and vLLM (hf, hf-fp8) or for llama.cpp (gguf)."""
    from rich.console import Console
    from rich.markup import escape

    from leanseek import checkpoint
    from leanseek.reading import shorten
    from leanseek.writing import partial_folder, writing

    if format not in ("hf", "hf-fp8", "gguf"):
        raise checkpoint.CheckpointError(f"--format {format!r} is not one of hf, hf-fp8, gguf")
    folder = checkpoint.resolve(source, allow_links)
    tokenizer = tokenizer or checkpoint.find_tokenizer(folder, allow_links)
    allowed: dict[str, Any] = {"allow_links": allow_links, "allow_nonfinite": allow_nonfinite}
    console, left = Console(stderr=True), list[str]()
    with console.status(f"reading {escape(str(source))}, writing {escape(str(out))}"):
        if format != "gguf":
            model = checkpoint.load(folder, dtype=dtype, allow_links=allow_links)
            if ema:
                checkpoint.load_ema(model, folder)
            left = checkpoint.save(model, out, format, tokenizer, beside=folder, **allowed)
        elif ema:
            with writing(out), partial_folder(out, "ema") as averaged:
                model = checkpoint.load_ema(checkpoint.load(folder, allow_links=allow_links), folder)
                checkpoint.save(model, averaged / folder.name, beside=folder, **allowed)
                checkpoint.export_gguf(averaged / folder.name, out, dtype, tokenizer, **allowed)
        else:
            checkpoint.export_gguf(folder, out, dtype, tokenizer, **allowed)
    nothing = "" if tokenizer else ", without a tokenizer: none was found"
    console.print(f"wrote {shorten(str(out), 1000)}{nothing}", markup=False, soft_wrap=True)
    for line in left:
        console.print(f"left out: {shorten(line, 1000)}", markup=False, soft_wrap=True)
