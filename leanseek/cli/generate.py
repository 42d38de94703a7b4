"""leanseek generate: continue a prompt."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanseek.cli.terminal import given_text, shown
from leanseek.errors import Interrupted

if TYPE_CHECKING:
    from leanseek.engine import Engine

DEFAULT_TEMPERATURE = 0.8  # if neither the user nor the model sets one
AllowLinks = Annotated[bool, typer.Option("--allow-links", help="follow links out of the model's folder")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="also write weights with NaN or infinity, and name them")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads  (default: one per physical core)")]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face folder or a run")],
    prompt: Annotated[str, typer.Argument(help="the text to continue; - reads it from standard input")],
    max_tokens: Annotated[int, typer.Option(help="the most tokens to generate")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help=f"0 is greedy  [default: the model's, else {DEFAULT_TEMPERATURE}]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same text")] = None,
    threads: Threads = None,
    allow_links: AllowLinks = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> None:
    """Continue a text, streaming it to standard output."""
    from leanseek.engine import LLM, CompletionOutput
    from leanseek.machine.device import use_threads

    use_threads(threads)
    llm = LLM(model, allow_links=allow_links)
    text = given_text(sys.stdin.read() if prompt == "-" else prompt)
    params = sampling_params(llm.engine.defaults, max_tokens=max_tokens, temperature=temperature, seed=seed)
    if as_json:
        output: CompletionOutput = llm.generate(text, params)[0].outputs[0]
        print(json.dumps(describe(output)), flush=True)
    else:
        print(shown(text), end="", flush=True)
        try:
            for delta in llm.stream(text, params):
                print(shown(delta.text), end="", flush=True)
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None
        finally:
            print(flush=True)
    finish_copy(llm.engine)


def finish_copy(engine: Engine) -> None:
    """Wait until the packed copy of the weights is written: exiting would cut it short. Ctrl-C stops it."""
    if engine.copying is None or not engine.copying.is_alive():
        return
    from rich.console import Console

    with Console(stderr=True).status("writing the packed weights once, for the next start to map (Ctrl-C skips it)"):
        try:
            engine.copying.join()
        except KeyboardInterrupt:
            raise Interrupted("stopped; the next start writes the copy from scratch") from None


def sampling_params(defaults: dict[str, Any], **given: Any) -> Any:
    """SamplingParams from the given values, else the model's defaults, else DEFAULT_TEMPERATURE and no token limit."""
    from leanseek.engine import SamplingParams

    given = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(**{"temperature": DEFAULT_TEMPERATURE, "max_tokens": None} | defaults | given)


def describe(output: Any) -> dict[str, Any]:
    """What `--json` prints for a CompletionOutput."""
    timing = output.timing
    seconds = timing.finished - timing.first_token
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "usage": asdict(output.usage),
        "time_to_first_token": timing.first_token - timing.arrived,
        "tokens_per_second": (len(output.token_ids) - 1) / seconds if seconds > 0 else None,
    }
