"""leanseek chat: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanseek.cli.generate import AllowLinks, Threads, sampling_params
from leanseek.cli.terminal import given_text, shown
from leanseek.errors import InputError
from leanseek.reading import shorten

if TYPE_CHECKING:
    from leanseek.engine import LLM, SamplingParams
    from leanseek.server.templates import ChatTemplate

HELP = "/system TEXT sets the system prompt, /reset clears the conversation, /exit quits; Ctrl-C stops an answer"


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face folder or a run")],
    max_tokens: Annotated[int | None, typer.Option(help="tokens per answer  (default: no limit)")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy  (default: the model's, else 0.8)")] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed and messages give the same answers")] = None,
    threads: Threads = None,
    allow_links: AllowLinks = False,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a Jinja chat template instead of the model's")
    ] = None,
) -> None:
    """Chat in the terminal, with history; /system, /reset and /exit."""
    with contextlib.suppress(ImportError):  # some Pythons are built without it
        import readline  # noqa: F401  (gives input() its line editing and history)

    from rich.console import Console

    from leanseek.engine import LLM, EngineError
    from leanseek.machine.device import use_threads
    from leanseek.server.templates import template_of

    use_threads(threads)
    llm = LLM(model, allow_links=allow_links)
    if llm.tokenizer is None:
        raise EngineError(f"{model} has no tokenizer.json")
    template = template_of(llm.tokenizer, llm.engine.config, chat_template)
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": template.stop}
    params = sampling_params(llm.engine.defaults, **given)
    console = Console(highlight=False)
    console.print(HELP, style="dim")
    messages: list[dict[str, str]] = []
    while (line := _read()) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            messages = [message for message in messages if message["role"] == "system"]
        elif command == "/system":
            messages = [{"role": "system", "content": rest}] if rest else []
        elif command.startswith("/"):
            console.print(HELP, style="dim")
        elif command:
            try:
                said = {"role": "user", "content": given_text(line, "the line")}
                answer, figures = _answer(llm, template, [*messages, said], params)
            except InputError as error:  # the conversation outgrew the context, or the template refuses it
                console.print(shorten(str(error), 1000), style="red", markup=False)
                continue
            except KeyboardInterrupt:  # outside the answer's stream: drop the message
                console.print("\nstopped", style="dim")
                continue
            messages += [said, {"role": "assistant", "content": answer}]
            console.print(figures, style="dim")


def _read() -> str | None:
    """A line, or None at the end of the input."""
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answer(
    llm: LLM, template: ChatTemplate, messages: list[dict[str, str]], params: SamplingParams
) -> tuple[str, str]:
    """Stream the model's answer to the terminal; return its text and a line of figures."""
    assert llm.tokenizer is not None
    most = llm.engine.max_model_len
    prompt = llm.tokenizer.encode(template.render(messages), add_special_tokens=False, most=most)
    text, tokens, start, first = "", 0, time.monotonic(), None
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(llm.stream(prompt, params)) as deltas:
        for delta in deltas:
            first = first or time.monotonic()
            text += delta.text
            tokens += len(delta.token_ids)
            print(shown(delta.text), end="", flush=True)
    print()
    end = time.monotonic()
    if first is None:
        return text, f"stopped after {end - start:.2f} s, before the first token"
    return text, f"{tokens} tokens, {tokens / max(end - first, 1e-9):.1f} tokens/s, first after {first - start:.2f} s"
