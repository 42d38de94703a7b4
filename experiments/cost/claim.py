"""What V3's training cost, by its published rates and by the planner; dense networks beside it. Nothing trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanseek import planning
from leanseek.config import ModelConfig
from leanseek.pages import COLORS, INK
from leanseek.planning.hardware import GPUS
from leanseek.planning.layout import Recipe
from leanseek.planning.published import H800_PRICE, HOURS_PER_TRILLION, PRETRAINING_TOKENS, baselines, table_1
from leanseek.planning.search import search
from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import named
from leanseek.reproduce.results import Found
from leanseek.training import RunConfig

PAPER_HOURS, PAPER_DOLLARS = 2_788_000, 5.576e6
GPUS_USED = 2048
WITHIN = 0.15  # of the published hours: as far as the planner is known to be off (docs/plan.md)


def measure(run: RunConfig | None, folder: Path | None, quick: bool) -> dict[str, Any]:
    """Table 1 from its rates; the hours of the planner's fastest layout; and other networks on as many tokens at the
    share of the peak that V3 reached by its published hours."""
    v3, gpu, table = ModelConfig.preset("v3-671b"), GPUS["h800"], table_1()
    plan = search(v3, GPUS_USED, gpu, Recipe())[0]
    tokens_per_hour = 1e12 / HOURS_PER_TRILLION
    reached = tokens_per_hour / 3600 * planning.train_flops_per_token(v3, Recipe().seq_len)  # FLOP/s a GPU
    networks = {"V3 671B": v3, **baselines()}
    flops = {name: planning.train_flops_per_token(config, Recipe().seq_len) for name, config in networks.items()}
    return {
        "hours": table.hours, "dollars": table.dollars,
        "planned_hours": plan.gpu_hours(PRETRAINING_TOKENS), "share_of_peak": reached / gpu.bf16,
        "flops_per_token": flops,
        "hours_of": {name: PRETRAINING_TOKENS * each / reached / 3600 for name, each in flops.items()},
        "activated": {name: planning.activated_parameters(config) for name, config in networks.items()},
    }  # fmt: skip


def judge(found: Found) -> Verdict:
    m = found.runs[""][found.seeds[0]].measured
    total, planned, published = m["hours"]["total"], m["planned_hours"], m["hours"]["pre-training"]
    same = abs(total - PAPER_HOURS) < 1 and abs(m["dollars"] - PAPER_DOLLARS) < 1
    near = abs(planned / published - 1) < WITHIN
    hours = m["hours_of"]
    dense = hours["dense 671B"] / hours["V3 671B"]
    ours = (
        f"{total / 1e3:,.0f} K hours and ${m['dollars'] / 1e6:.3f} M from the published rates; by the planner, pre-"
        f"training alone is {planned / 1e3:,.0f} K, {planned / published - 1:+.0%} of {published / 1e3:,.0f} K."
    )
    text = (
        "The rates multiply to the table's totals. The planner, in which no constant is fitted to a training run, "
        f"estimates steps alone, without restarts, evaluation and the batch's ramp. At the {m['share_of_peak']:.0%} of "
        f"BF16's peak that the published hours mean, a dense network as large would take {dense:.0f} times as long "
        f"({hours['dense 671B'] / 1e6:.1f} M hours, ${hours['dense 671B'] * H800_PRICE / 1e6:.0f} M) and LLaMA-3.1 "
        f"405B {hours['LLaMA-405B'] / hours['V3 671B']:.1f} times ({hours['LLaMA-405B'] / 1e6:.1f} M) for the same "
        "tokens. That is arithmetic on published figures: no bill has been seen."
    )
    return Verdict("held" if same and near else "held in part" if same else "contradicted", ours, text)


def draw(figure: Figure, found: Found) -> None:
    m = found.runs[""][found.seeds[0]].measured
    left, right = figure.subplots(1, 2)
    stages = [name for name in m["hours"] if name != "total"]
    start = 0.0
    for color, stage in zip(COLORS, stages, strict=False):
        left.barh("the paper", m["hours"][stage] / 1e6, left=start, color=color, label=stage)
        start += m["hours"][stage] / 1e6
    left.barh("the planner", m["planned_hours"] / 1e6, color=COLORS[0])
    named(left, "million H800 hours", "")
    left.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    names = list(m["hours_of"])
    hours = [m["hours_of"][name] / 1e6 for name in names]
    right.barh(names, hours, color=[COLORS[0], *[COLORS[1]] * (len(names) - 1)])
    for place, value in enumerate(hours):
        right.text(value, place, f" {value:,.1f} M, ${value * H800_PRICE:,.0f} M", va="center", color=INK, fontsize=9)
    right.set_xlim(0, max(hours) * 1.35)
    named(right, "million H800 hours for 14.8 T tokens", "", legend=False)
