"""leanseek sample: verified answers of a model, as rows for fine-tuning."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanseek.cli.generate import AllowLinks, Threads, finish_copy, sampling_params
from leanseek.cli.terminal import given_text, spelled
from leanseek.errors import InputError, Interrupted

if TYPE_CHECKING:
    from leanseek.posttraining.rewards import RewardConfig

_SAY_EVERY = 30  # seconds between progress lines when there is no terminal for a bar


def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face folder or a run")],
    prompts: Annotated[Path, typer.Argument(help=".jsonl or .parquet: rows with prompt or messages, and columns")],
    out: Annotated[Path, typer.Option(help="the .jsonl to write")],
    reward: Annotated[
        list[str],
        typer.Option(help="a built-in's name, file.py:function, package.module:function, or a .toml with [[rewards]]"),
    ],
    n: Annotated[int, typer.Option(min=1, max=128, help="answers to each prompt")] = 4,
    keep: Annotated[str, typer.Option(help="of a prompt's accepted answers: shortest, first or all")] = "shortest",
    threshold: Annotated[
        float | None, typer.Option(help="least weighted sum of rewards to accept  (default: the sum of the weights)")
    ] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt to sample under, written into the rows")] = None,
    temperature: Annotated[float | None, typer.Option(help="(default: the model's, else 0.8)")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="tokens per answer  (default: no limit)")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same answers")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="the first prompts only")] = None,
    threads: Threads = None,
    allow_links: AllowLinks = False,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a Jinja chat template instead of the model's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> None:
    """Sample answers, keep those the rewards accept, and write them as SFT rows. The same command continues."""
    from rich.console import Console
    from rich.progress import Progress

    from leanseek.engine import LLM
    from leanseek.machine.device import use_threads
    from leanseek.posttraining.prompts import read_prompts
    from leanseek.posttraining.sampling import SampleConfig, Sampler
    from leanseek.server.templates import template_of

    system = None if system is None else given_text(system, "--system")
    settings = SampleConfig(n=n, seed=seed, keep=keep, threshold=threshold, system=system)
    rows = read_prompts(prompts.expanduser())[:limit]
    rewards = _rewards(reward)
    use_threads(threads)
    llm = LLM(model, allow_links=allow_links)
    if llm.tokenizer is None:
        raise InputError(f"{model} has no tokenizer.json")
    template = template_of(llm.tokenizer, llm.engine.config, chat_template)
    given = {"max_tokens": max_tokens, "temperature": temperature, "stop": template.stop}
    params = sampling_params(llm.engine.defaults, **given)
    console, said = Console(stderr=True), time.monotonic()
    bar = Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal)
    with Sampler(llm, rewards, settings, params, template.render) as sampler, bar:
        task = bar.add_task("prompts", total=len(rows))

        def tell(done: int, right: int) -> None:
            nonlocal said
            share = f"{right / (n * done):.1%} right" if done else ""
            bar.update(task, completed=done, description=share or "prompts")
            if not console.is_terminal and time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                console.print(f"{done:,} of {len(rows):,} prompts, {share}", markup=False)

        try:
            found = sampler.run(rows, out.expanduser(), model, tell)
        except KeyboardInterrupt:
            raise Interrupted("stopped; the same command continues") from None
    finish_copy(llm.engine)
    if as_json:
        print(json.dumps({"out": str(out)} | found))
    else:
        _print(found, out)


def _rewards(given: list[str]) -> tuple[RewardConfig, ...]:
    from leanseek.posttraining.rewards import read_rewards
    from leanseek.reading import read_toml

    tables: list[Any] = []
    for one in given:
        if not one.endswith(".toml"):
            tables.append({"function": one})
            continue
        found = read_toml(Path(one).expanduser()).get("rewards")
        if not isinstance(found, list) or not found:
            raise InputError(f"{one} has no [[rewards]]")
        tables += found
    return read_rewards(tables)


def _print(found: dict[str, Any], out: Path) -> None:
    print(f"{found['prompts']:,} prompts, {found['samples']:,} answers, {found['rows']:,} rows in {spelled(str(out))}")
    passed = ", ".join(f"pass@{k} {value:.1%}" for k, value in found["pass_at"].items() if value is not None)
    print(passed or "no answer was scored")
    print("mean rewards: " + ", ".join(f"{spelled(k)} {v:.3f}" for k, v in found["rewards"].items() if v is not None))
    print(
        f"{found['unsolved']:,} prompts without an accepted answer, {found['cut_off']:,} answers cut off, "
        f"{found['abstained']:,} without a reward; {found['completion_tokens']:.1f} tokens an answer, "
        f"{found['tokens_per_second']:,.0f} tokens/s"
    )
