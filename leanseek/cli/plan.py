"""leanseek plan: what training a network takes on a cluster, before anyone rents one."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanseek import planning
from leanseek.cli.generate import AllowLinks
from leanseek.cli.info import find_config
from leanseek.config import ConfigError, ModelConfig
from leanseek.planning import published
from leanseek.planning.hardware import GPUS, find_gpu
from leanseek.planning.layout import Recipe
from leanseek.planning.memory import memory
from leanseek.planning.schedules import SCHEDULES
from leanseek.planning.search import Plan, as_settings, best_by_layout, search
from leanseek.reading import shorten

if TYPE_CHECKING:
    from rich.table import Table


_SIZES = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3, "": 1.0}  # of token counts

_WHOLE = (lambda v: type(v) is int and 1 <= v < 2**31, "a whole number of at least 1")
_FLAG = (lambda v: type(v) is bool, "true or false")

# Settings of a run that a plan takes: key -> (field of Layout, Recipe or Gpu; what is allowed; and how to say so)
_SETTINGS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "parallel.pp": ("pp", *_WHOLE),
    "parallel.ep": ("ep", *_WHOLE),
    "parallel.zero": ("zero", *_FLAG),
    "parallel.fsdp": ("fsdp", *_FLAG),
    "parallel.schedule": ("schedule", lambda v: v in tuple(SCHEDULES), f"one of {', '.join(SCHEDULES)}"),
    "parallel.ranks_per_node": ("node", *_WHOLE),
    "train.precision": ("precision", lambda v: v in ("bf16", "fp8"), "one of bf16, fp8"),
    "train.recompute": ("recompute", *_FLAG),
    "train.micro_batch_size": ("micro_batch_size", *_WHOLE),
    "train.batch_size": ("batch_size", *_WHOLE),
    "data.seq_len": ("seq_len", *_WHOLE),
    "optimizer.ema": ("ema", lambda v: type(v) in (int, float) and 0 <= v < 1, "a number in [0, 1)"),
}


def plan(
    model: Annotated[str, typer.Argument(help="preset, TOML file, checkpoint folder or run")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.KEY=VALUE]...", help="fixes part of the layout: parallel.pp=16 data.seq_len=4096"
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(help="how many GPUs")] = 2048,
    gpu: Annotated[str, typer.Option(metavar="NAME", help=f"which: {', '.join(GPUS)}")] = "h800",
    tokens: Annotated[str, typer.Option(metavar="T", help="training tokens: 500B, 14.8T")] = "14.8T",
    price: Annotated[float | None, typer.Option(help="dollars per GPU hour, in place of the table's")] = None,
    schedule: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw the pipeline's timeline into an .svg or .png file")
    ] = None,
    allow_links: AllowLinks = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """What training takes on a cluster: the fastest layout that fits, memory, time, GPU hours and dollars."""
    config, card, amount = find_config(model, allow_links), find_gpu(gpu), count_tokens(tokens)
    if not 1 <= gpus <= 2**20:
        raise ConfigError(f"--gpus {gpus} is not a number of GPUs from 1 to 1,048,576")
    if price is not None:
        if not 0 < price < 1e6:
            raise ConfigError(f"--price {price} is not a price: give dollars per GPU hour")
        card = dataclasses.replace(card, price=price)
    values = read_settings(settings or [])
    if "node" in values:
        card = dataclasses.replace(card, node=values.pop("node"))
    recipe = Recipe(seq_len=min(4096, config.max_position_embeddings))
    given = {key: values.pop(key) for key in ("seq_len", "batch_size", "ema") if key in values}
    recipe = dataclasses.replace(recipe, **given)
    if recipe.seq_len > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ConfigError(f"data.seq_len = {recipe.seq_len} is beyond model.max_position_embeddings = {limit}")
    plans = search(config, gpus, card, recipe, values)
    if schedule:
        _draw(plans[0], schedule)
    found = describe(model, plans, amount)
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)


def count_tokens(text: str) -> float:
    """ "14.8T" -> 14.8e12. Raises ConfigError."""
    found = re.fullmatch(r"(\d[\d,_]*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([KMBT]?)", text.strip(), re.IGNORECASE)
    number = 0.0
    if found:
        number = float(found[1].replace(",", "").replace("_", "")) * _SIZES[found[2].upper()]
    if not 1 <= number <= 1e18:
        raise ConfigError(f"--tokens {shorten(repr(text))} is not a number of tokens, such as 500B or 14.8T")
    return number


def read_settings(texts: list[str]) -> dict[str, Any]:
    """Overrides as `leanseek train` takes them -> values of Layout, Recipe and node. Raises ConfigError."""
    found: dict[str, Any] = {}
    for text in texts:
        key, sign, raw = text.partition("=")
        if not sign or key.strip() not in _SETTINGS:
            raise ConfigError(f"{shorten(repr(text))} is not a setting of a plan; there are {', '.join(_SETTINGS)}")
        name, allowed, words = _SETTINGS[key.strip()]
        try:
            value = tomllib.loads(f"x = {raw}")["x"]
        except (ValueError, RecursionError):
            value = raw.strip()  # a bare word is a string
        if not allowed(value):
            raise ConfigError(f"{key.strip()} = {shorten(repr(value))} is not {words}")
        found[name] = bool(value) if name == "ema" else value
    return found


def _draw(best: Plan, out: Path) -> None:
    """The pipeline's start, a few micro-batches and its end, in the plan's times."""
    from leanseek.planning.timeline import draw_schedule
    from leanseek.planning.timing import stage_times

    layout = best.layout
    if layout.pp == 1:
        raise ConfigError("--schedule draws a pipeline, and the fastest layout has pp = 1; fix one with parallel.pp=4")
    batches = min(layout.micro_batches(best.recipe), 2 * layout.pp + 8)
    draw_schedule(layout.schedule, layout.pp, batches, out, stage_times(best.config, best.recipe, layout, best.gpu))


# ---- the answer ----


def describe(name: str, plans: list[Plan], tokens: float) -> dict[str, Any]:
    """The figures of the fastest plan, the next best layouts, and what others published."""
    best = plans[0]
    config, recipe, layout, step = best.config, best.recipe, best.layout, best.step
    hours = best.gpu_hours(tokens)
    found = {
        "model": name,
        "parameters": planning.parameters(config),
        "activated_parameters": planning.activated_parameters(config),
        "tokens": tokens,
        "gpu": best.gpu.name,
        "gpus": layout.gpus,
        "seq_len": recipe.seq_len,
        "batch_size": recipe.batch_size,
        "layout": {**dataclasses.asdict(layout), "cp": 1, "micro_batches": layout.micro_batches(recipe)},
        "settings": as_settings(layout, best.gpu.node),
        "memory_per_gpu_bytes": best.memory,
        "memory_total_bytes": sum(best.memory.values()),
        "memory_limit_bytes": best.gpu.memory,
        "activation_bytes": {
            f"{precision}{', recomputed' * again}": memory(
                config, recipe, dataclasses.replace(layout, precision=precision, recompute=again), best.gpu.node
            )["activations"]
            for precision in ("bf16", "fp8")
            for again in (False, True)
        },
        "memory_as_in_paper_bytes": memory(config, recipe, layout, best.gpu.node, paper=True),
        "step_seconds": {"total": step.seconds, **{k: v for k, v in dataclasses.asdict(step).items() if k != "hidden"}},
        "bubble_fraction": step.bubble / step.seconds,
        "exchange_hidden_fraction": step.hidden,
        "tokens_per_second_per_gpu": best.tokens_per_second_per_gpu,
        "mfu": best.mfu,
        "days": hours / layout.gpus / 24,
        "gpu_hours": hours,
        "price_per_gpu_hour": best.gpu.price,
        "cost_dollars": hours * best.gpu.price,
        "other_layouts": [
            {
                "layout": dataclasses.asdict(plan.layout),
                "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
                "bubble_fraction": plan.step.bubble / plan.step.seconds,
                "memory_total_bytes": sum(plan.memory.values()),
            }
            for plan in best_by_layout(plans, 6)[1:]
        ],
        "compared": _compared(name, best, tokens),
    }
    if published.is_v3(config):
        found["published"] = _published(config)
    return found


def _compared(name: str, best: Plan, tokens: float) -> list[dict[str, Any]]:
    """The network beside the baselines. Their hours are those of the same share of the peak."""
    rows = []
    for label, other in {name: best.config, **published.baselines()}.items():
        flops = planning.train_flops_per_token(other, best.recipe.seq_len)
        rows.append(
            {
                "name": label,
                "parameters": planning.parameters(other),
                "activated_parameters": planning.activated_parameters(other),
                "train_flops_per_token": flops,
                "kv_bytes_per_token": planning.kv_bytes_per_token(other),
                "gpu_hours": tokens * flops / (best.mfu * best.gpu.bf16) / 3600,
            }
        )
    return rows


def _published(config: ModelConfig) -> dict[str, Any]:
    """Table 1 from its rates, and our estimate of every published speed with its error."""
    table = published.table_1()
    speeds = []
    for reference in published.REFERENCES:
        estimate = reference.estimate(config)
        speeds.append(
            {
                "name": reference.name,
                "tokens_per_second_per_gpu": reference.tokens_per_second_per_gpu,
                "estimate": estimate,
                "error": estimate / reference.tokens_per_second_per_gpu - 1,
            }
        )
    return {"table_1_gpu_hours": table.hours, "table_1_cost_dollars": table.dollars, "speeds": speeds}


# ---- as tables ----

Rows = list[tuple[str, ...]]


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    tables = [_answer(found), _memory(found), _time(found), _others(found), _beside(found)]
    console = Console()
    console.print(*tables, *_held_against(found), sep="\n")
    print("leanseek train CONFIG", *found["settings"])


def _table(title: str, columns: tuple[str, ...], rows: Rows) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title), title_justify="left", show_header=any(columns))
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def _answer(found: dict[str, Any]) -> Table:
    speed, price = found["tokens_per_second_per_gpu"], found["price_per_gpu_hour"]
    rows: Rows = [
        ("layout", _shape(found["layout"])),
        ("tokens per second per GPU", f"{speed:,.0f} ({found['mfu']:.1%} of BF16 peak)"),
        ("days", f"{found['days']:,.2f}"),
        ("GPU hours", _hours(found["gpu_hours"])),
        ("cost", f"${found['cost_dollars']:,.2f} at ${price:.2f} an hour"),
    ]
    amount = next((f"{found['tokens'] / size:g} {s}" for s, size in _SIZES.items() if found["tokens"] >= size))
    name = shorten(found["model"], 100)
    return _table(f"{name}, {amount} tokens on {found['gpus']:,} {found['gpu']}", ("", ""), rows)


def _memory(found: dict[str, Any]) -> Table:
    rows: Rows = [(k.replace("_", " "), _gib(v)) for k, v in found["memory_per_gpu_bytes"].items() if v]
    rows.append(("sum", f"{_gib(found['memory_total_bytes'])} of {found['memory_limit_bytes'] / 2**30:,.0f}"))
    rows.append(("sum, kept as in the paper", _gib(sum(found["memory_as_in_paper_bytes"].values()))))
    rows += [(f"activations in {how}", _gib(size)) for how, size in found["activation_bytes"].items()]
    return _table("Memory of the fullest GPU", ("", ""), rows)


def _time(found: dict[str, Any]) -> Table:
    step = found["step_seconds"]
    labels = {"exposed": "exchange, not hidden", "slowed": "lost to exchanges beside"}
    parts = ("compute", "bubble", "slowed", "exposed", "gradients", "optimizer")
    rows: Rows = [(labels.get(k, k), f"{step[k]:,.3f} s", f"{step[k] / step['total']:.1%}") for k in parts]
    rows.append(("exchange of all ranks, hidden", "", f"{found['exchange_hidden_fraction']:.1%}"))
    title = f"A step of {found['batch_size']:,} x {found['seq_len']:,} tokens, slowest rank: {step['total']:,.2f} s"
    return _table(title, ("", "", ""), rows)


def _others(found: dict[str, Any]) -> Table:
    rows: Rows = []
    for other in found["other_layouts"]:
        speed, bubble = f"{other['tokens_per_second_per_gpu']:,.0f}", f"{other['bubble_fraction']:.1%}"
        rows.append((_shape(other["layout"]), speed, bubble, _gib(other["memory_total_bytes"])))
    return _table("Other layouts that fit", ("", "tokens/s/GPU", "bubble", "memory"), rows)


def _beside(found: dict[str, Any]) -> Table:
    rows: Rows = []
    for one in found["compared"]:
        sizes = f"{one['parameters'] / 1e9:,.1f} B", f"{one['activated_parameters'] / 1e9:,.1f} B"
        work, cache = f"{one['train_flops_per_token'] / 1e9:,.1f}", f"{one['kv_bytes_per_token']:,}"
        rows.append((shorten(one["name"], 60), *sizes, work, cache, _hours(one["gpu_hours"])))
    columns = ("", "params", "activated", "GFLOP/token", "cache bytes", "GPU hours")
    return _table("The same tokens at the same share of the peak", columns, rows)


def _held_against(found: dict[str, Any]) -> list[Table]:
    if "published" not in found:
        return []
    published = found["published"]
    table: Rows = [(stage, f"{hours / 1000:,.0f} K") for stage, hours in published["table_1_gpu_hours"].items()]
    table.append(("cost", f"${published['table_1_cost_dollars'] / 1e6:,.3f} M"))
    speeds: Rows = []
    for one in published["speeds"]:
        speed, estimate = f"{one['tokens_per_second_per_gpu']:,.0f}", f"{one['estimate']:,.0f}"
        speeds.append((one["name"], speed, estimate, f"{one['error']:+.0%}"))
    return [
        _table("The paper's table 1, H800 hours, from its rates", ("", ""), table),
        _table("V3's published tokens/s/GPU", ("", "published", "estimate", "error"), speeds),
    ]


def _shape(layout: dict[str, Any]) -> str:
    """ "pp 16, ep 64, dp 128, zero, dualpipev, fp8"."""
    sizes = [f"{name} {layout[name]}" for name in ("pp", "ep", "dp")]
    flags = [name for name in ("zero", "fsdp", "recompute") if layout[name]]
    schedule = [layout["schedule"]] if layout["pp"] > 1 else []
    batch = [f"micro-batch {layout['micro_batch_size']}"] if layout["micro_batch_size"] > 1 else []
    return ", ".join((*sizes, *flags, *schedule, layout["precision"], *batch))


def _hours(hours: float) -> str:
    return f"{hours:,.{0 if hours >= 100 else 2}f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
