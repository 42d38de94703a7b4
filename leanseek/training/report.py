"""The report of a run: a self-contained HTML file, and a picture for a README."""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leanseek import planning
from leanseek.config import ModelConfig
from leanseek.pages import COLORS, INK, card, figure, inline, page, quiet, svg
from leanseek.plotting import Axes, MaxNLocator
from leanseek.reading import parse_json, read_text, read_toml
from leanseek.training.metrics import SAMPLES, read_rows

Rows = list[dict[str, Any]]
SHOWN = 8  # completions of a step


def write_report(run: Path, compare: Path | None = None) -> Path:
    """Write `run/report.html` from its config.toml and metrics.jsonl, with the curves of the run `compare`, if given.

    Parts without rows (no validation, no experts, a truncated last line) are left out.
    """
    config, rows = _read(run)
    other = _read(compare) if compare and (compare / "metrics.jsonl").is_file() else None
    model = ModelConfig.from_dict(config["model"])
    trained = [r for r in rows if "loss" in r]
    charts = [card(title, svg(draw)) for title, draw in _line_charts(rows, other, run.name, compare)]
    charts += [card("Load per expert over the run", svg(draw, wide=True), wide=True) for draw in _load_maps(trained)]
    charts += [card(title, svg(draw, wide=True), wide=True) for title, draw in _rank_chart(trained)]
    if (run / "timeline.svg").is_file():
        charts.append(card("The last step on the pipeline's ranks", inline(read_text(run / "timeline.svg")), wide=True))
    if (run / SAMPLES).is_file():
        charts.append(card("Answers of the last evaluation, to held-out prompts", _answers(run / SAMPLES), wide=True))
    written = read_text(run / "config.toml")
    body = f"""<h1>{html.escape(run.name)}</h1><p>{html.escape(_sentence(model, trained))}</p>
<div class="figures">{"".join(figure(*f) for f in _figures(model, rows, trained))}</div>
<div class="charts">{"".join(charts)}</div><br>{_completions(run)}{_cache_table(model)}
<section><h2>Configuration</h2><pre>{html.escape(written)}</pre></section>
"""
    path = run / "report.html"
    path.write_text(page(f"{run.name} · leanseek", body), encoding="utf-8")
    return path


def _read(run: Path) -> tuple[dict[str, Any], Rows]:
    return read_toml(run / "config.toml"), read_rows(run / "metrics.jsonl")


def _answers(path: Path) -> str:
    rows = [parse_json(line, str(path)) for line in read_text(path).splitlines()]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    each = (f"<pre>{html.escape(str(row['prompt']))}<b>{html.escape(str(row['answer']))}</b></pre>" for row in last)
    return "<hr>".join(each)


# ---- words and figures ----


def _sentence(model: ModelConfig, trained: Rows) -> str:
    total, active = planning.parameters(model, mtp=True), planning.activated_parameters(model)
    kind = "MLA" if model.attention == "mla" else f"attention with {model.kv_heads} key heads"
    experts = (
        f", {model.n_routed_experts} routed experts, {model.num_experts_per_tok} a token"
        if model.n_routed_experts
        else ""
    )
    tokens = f"; {trained[-1]['tokens']:,} tokens" if trained else ""
    return f"{total / 1e6:,.1f} M parameters, {active / 1e6:,.1f} M activated; {kind}{experts}{tokens}"


def _figures(model: ModelConfig, rows: Rows, trained: Rows) -> list[tuple[str, str]]:
    figures = []
    if trained:
        figures.append((f"{trained[-1]['loss']:.3f}", "training loss at the end"))
    if validated := [r for r in rows if "val_loss" in r]:
        figures.append((f"{validated[-1]['val_loss']:.3f}", "validation loss"))
        if "val_bits_per_byte" in validated[-1]:
            figures.append((f"{validated[-1]['val_bits_per_byte']:.3f}", "validation bits per byte"))
    if trained:
        speeds = sorted(r["tokens_per_second"] for r in trained)
        shares = sorted(r["mfu"] for r in trained)
        figures.append((f"{speeds[len(speeds) // 2]:,.0f}", "tokens per second, median"))
        figures.append((f"{shares[len(shares) // 2]:.0%}", "of the measured GEMM rate"))
        if model.n_routed_experts:
            figures.append((f"{_smooth([r['max_violation'] for r in trained])[-1]:.3f}", "max violation at the end"))
    return figures


def _cache_table(model: ModelConfig) -> str:
    """KV bytes per token in BF16, compared with MHA, GQA and MQA of the same network."""
    own = planning.kv_bytes_per_token(model)
    heads = model.num_attention_heads
    kinds = {"this network": own, f"MHA, {heads} key heads": planning.kv_bytes_per_token_as(model, heads)}
    if heads % 4 == 0 and heads > 4:
        kinds[f"GQA, {heads // 4} key heads"] = planning.kv_bytes_per_token_as(model, heads // 4)
    kinds["MQA, 1 key head"] = planning.kv_bytes_per_token_as(model, 1)
    rows = "".join(f"<tr><td>{k}</td><td>{v:,}</td><td>{v / own:.2f}×</td></tr>" for k, v in kinds.items())
    head = "<tr><th>KV cache in BF16</th><th>bytes per token</th><th>of this network's</th></tr>"
    return f"<section><h2>Cache</h2><table>{head}{rows}</table></section>"


def _completions(run: Path) -> str:
    """What a policy in training said in its first and last step, with rewards; nothing without completions.jsonl."""
    if not (path := run / "completions.jsonl").is_file():
        return ""
    rows = read_rows(path)
    cells = [
        (str(r["step"]), str(r["prompt"])[-300:], r["completion"][:600], str(r["reward"]))
        for step in sorted({rows[0]["step"], rows[-1]["step"]})
        for r in [r for r in rows if r["step"] == step][:SHOWN]
    ]
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    head = "<tr><th>step</th><th>prompt</th><th>completion</th><th>reward</th></tr>"
    return f"<section><h2>Completions</h2><table>{head}{body}</table></section>"


# ---- charts ----

Draw = Callable[[Axes], None]


def _line_charts(
    rows: Rows, other: tuple[dict[str, Any], Rows] | None, name: str, compare: Path | None
) -> list[tuple[str, Draw]]:
    trained, validated = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    beside = [r for r in other[1] if "loss" in r] if other else []
    found: list[tuple[str, Draw]] = []

    def chart(title: str, *lines: tuple[Rows, str, str], log: bool = False, smooth: bool = True) -> None:
        kept = [(r, k, label) for r, k, label in lines if any(x.get(k) is not None for x in r)]
        if kept:
            found.append((title, lambda ax: _lines(ax, kept, log, smooth)))

    chart("Loss", (trained, "loss", "training"), (validated, "val_loss", "validation"), (trained, "mtp_loss", "MTP"))
    chart("Bits per byte, validation", (validated, "val_bits_per_byte", name), smooth=False)
    label = compare.name if compare else ""
    violation = [(trained, "max_violation", name), (beside, "max_violation", label)]
    chart("Max violation", *[v for v in violation if any(x["max_violation"] for x in v[0])], log=True)
    chart("Learning rate", (trained, "lr", "learning rate"), smooth=False)
    chart("Gradient norm", (trained, "grad_norm", "before clipping"), log=True)
    chart("Tokens per second", (trained, "tokens_per_second", "tokens per second"))
    return found + _policy_charts(rows)


def _policy_charts(rows: Rows) -> list[tuple[str, Draw]]:
    """The curves of reinforcement learning; none for other runs."""
    keys = [key for key in dict.fromkeys(k for row in rows for k in row) if key.startswith(("reward", "pass_at_"))]
    together = {
        "Reward": [key for key in keys if key.startswith("reward")],
        "Solved, held-out prompts": [key for key in keys if key.startswith("pass_at_")],
        "Tokens of a completion": ["completion_length"],
        "Entropy": ["entropy"],
        "Shares": ["no_spread", "cut_off", "clipped", "mismatch"],
        "Ratio to the sampler": ["ratio_max", "ratio_mean"],
        "KL to the reference": ["kl"],
        "Rollout tokens per second": ["rollout_tokens_per_second", "train_tokens_per_second"],
    }

    def draw(lines: list[tuple[Rows, str, str]]) -> Draw:
        return lambda ax: _lines(ax, lines, False, False)

    found = []
    for title, wanted in together.items() if keys else ():
        lines = [(own, key, key) for key in wanted if (own := [r for r in rows if r.get(key) is not None])]
        if lines:
            found.append((title, draw(lines)))
    return found


def _lines(ax: Axes, lines: list[tuple[Rows, str, str]], log: bool, smooth: bool) -> None:
    for (rows, key, label), color in zip(lines, COLORS, strict=False):
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        steps, values = [p[0] for p in points], [p[1] for p in points]
        if smooth and len(values) > 50:
            ax.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
            values = _smooth(values)
        ax.plot(steps, values, color=color, linewidth=1.7, label=label)
    if log:
        ax.set_yscale("log")
    if len(lines) > 1:
        ax.legend(frameon=False, fontsize=9, labelcolor=INK)
    quiet(ax)
    ax.set_xlabel("step", color=INK, fontsize=9)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential average, corrected for its start."""
    mean, out = 0.0, []
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


def _load_maps(trained: Rows) -> list[Draw]:
    """A heat map for each MoE layer: steps on x, experts on y, 1 = an equal share."""
    rows = [r for r in trained if r.get("load")]

    def one(layer: str) -> Draw:
        def draw(ax: Axes) -> None:
            shares = [[x * len(r["load"][layer]) for x in r["load"][layer]] for r in rows]
            columns = list(zip(*shares, strict=True))  # [experts][rows]
            extent = (rows[0]["step"], rows[-1]["step"] + 1, 0, len(columns))
            image = ax.imshow(columns, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=2, extent=extent)
            bar = ax.figure.colorbar(image, ax=ax, pad=0.01)
            bar.ax.tick_params(labelsize=8, colors=INK)
            bar.outline.set_visible(False)  # type: ignore[operator]
            ax.set_title(f"layer {layer}: load of each expert, 1 = its equal share", fontsize=10, loc="left", color=INK)
            ax.set_xlabel("step", color=INK, fontsize=9)
            quiet(ax)

        return draw

    return [one(layer) for layer in (rows[0]["load"] if rows else {})]


def _rank_chart(trained: Rows) -> list[tuple[str, Draw]]:
    """What each rank spends a step on, by the median of the steps; the one that waits least is waited for.

    Of a run that was resumed on another number of ranks, the steps on the last number.
    """
    rows = [r["ranks"] for r in trained if r.get("ranks")]
    if not rows:
        return []
    rows = [row for row in rows if len(row["wait_s"]) == len(rows[-1]["wait_s"])]
    kinds = {"compute_s": "compute", "exchange_s": "exchange of rows for experts", "wait_s": "waiting for other ranks"}
    median = {kind: [statistics.median(v) for v in zip(*(r[kind] for r in rows), strict=True)] for kind in kinds}
    idle = [a + b for a, b in zip(median["exchange_s"], median["wait_s"], strict=True)]

    def draw(ax: Axes) -> None:
        below = [0.0] * len(idle)
        for (kind, label), color in zip(kinds.items(), COLORS, strict=False):
            if not any(median[kind]):
                continue  # no experts on other ranks
            ax.bar(range(len(idle)), median[kind], bottom=below, color=color, label=label, width=0.8)
            below = [a + b for a, b in zip(below, median[kind], strict=True)]
        ax.legend(frameon=False, fontsize=9, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("seconds of a step", color=INK, fontsize=9)
        quiet(ax)
        ax.set_xlabel("rank", color=INK, fontsize=9)

    return [(f"Time of each rank: rank {idle.index(min(idle))} waits least, so the others wait for it", draw)]
