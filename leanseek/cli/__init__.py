"""The command line: arguments -> config -> call. One module per command, which does heavy imports when it runs."""

from __future__ import annotations

import sys

import typer

from leanseek.cli import (
    bench,
    chat,
    convert,
    data,
    doctor,
    eval,
    export,
    generate,
    grpo,
    info,
    place,
    plan,
    reproduce,
    reward,
    sample,
    serve,
    sft,
    terminal,
    train,
)
from leanseek.errors import InputError, Interrupted, RunError

app = typer.Typer(
    name="leanseek",
    help="A complete, open DeepSeek-V3: train it, read its checkpoints, serve it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
for command in (
    train.train,
    sft.sft,
    reward.reward,
    generate.generate,
    grpo.grpo,
    chat.chat,
    serve.serve,
    sample.sample,
    export.export,
    convert.convert,
    info.info,
    plan.plan,
    place.place,
    doctor.doctor,
    reproduce.reproduce,
):
    app.command()(command)
app.command("eval")(eval.evaluate)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 failure, 2 bad input (one line on stderr), 130 interrupted."""
    terminal.prepare()
    try:
        app()
    except InputError as error:
        terminal.report(error)
        sys.exit(2)
    except UnicodeEncodeError as error:  # a file name from a TOML file
        if error.encoding != sys.getfilesystemencoding():
            raise
        name = error.object[:200]
        locale = f"the locale's encoding ({error.encoding}) cannot write the name {name!r}; set PYTHONUTF8=1"
        terminal.report(InputError(locale))
        sys.exit(2)
    except FileNotFoundError as error:
        if "usable temporary directory" not in str(error):
            raise
        terminal.report(InputError(f"{error.strerror}: set TMPDIR to a writable folder"))
        sys.exit(2)
    except RunError as error:
        terminal.report(error)
        sys.exit(1)
    except Interrupted as stopped:
        terminal.report(stopped)
        sys.exit(130)
