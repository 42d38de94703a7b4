"""The fastest layout of a run that fits its GPUs, and what it costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from leanseek.config import ConfigError, ModelConfig
from leanseek.planning.flops import train_flops_per_token
from leanseek.planning.hardware import GPUS, GiB, Gpu
from leanseek.planning.layout import Layout, Recipe
from leanseek.planning.memory import memory
from leanseek.planning.schedules import SCHEDULES
from leanseek.planning.timing import Step, step_time

MICRO_BATCHES = (1, 2, 4, 8, 16)  # sequences
LARGEST = 2**16  # GPUs that are tried where fewer do not hold a network


@dataclass(frozen=True)
class Plan:
    """A layout with its memory and time."""

    config: ModelConfig
    recipe: Recipe
    gpu: Gpu
    layout: Layout
    memory: dict[str, int]  # bytes on the fullest GPU, by part
    step: Step

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.recipe.batch_size * self.recipe.seq_len / self.step.seconds / self.layout.gpus

    @property
    def mfu(self) -> float:
        """Model FLOP/s as a share of the BF16 peak."""
        return self.tokens_per_second_per_gpu * train_flops_per_token(self.config, self.recipe.seq_len) / self.gpu.bf16

    def gpu_hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_second_per_gpu / 3600


def layouts(config: ModelConfig, gpus: int, gpu: Gpu, recipe: Recipe, fixed: dict[str, Any]) -> Iterator[Layout]:
    """Every layout of so many GPUs that divides; `fixed` holds values of Layout's fields that are given."""
    experts = config.n_routed_experts or 1
    for pp in _divisors(gpus, min(gpus, config.num_hidden_layers)):
        dp = gpus // pp
        for ep in _divisors(dp, experts):
            for values in _choices(pp, dp, gpu, fixed) if experts % ep == 0 else ():
                layout = Layout(pp=pp, dp=dp, ep=ep, **values)
                given = all(getattr(layout, name) == value for name, value in fixed.items())
                if given and _divides(config, layout, recipe):
                    yield layout


def _choices(pp: int, dp: int, gpu: Gpu, fixed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    sharding = [(False, False)]  # zero, fsdp
    if dp > 1:
        sharding += [(True, False), (False, True)] if pp == 1 else [(True, False)]
    schedules = tuple(SCHEDULES) if pp > 1 else (fixed.get("schedule", "1f1b"),)
    precisions = ("fp8", "bf16") if gpu.fp8 else ("bf16",)
    sizes = (fixed["micro_batch_size"],) if "micro_batch_size" in fixed else MICRO_BATCHES
    for (zero, fsdp), schedule, precision, recompute, size in itertools.product(
        sharding, schedules, precisions, (False, True), sizes
    ):
        yield {
            "zero": zero, "fsdp": fsdp, "schedule": schedule, "precision": precision, "recompute": recompute,
            "micro_batch_size": size,
        }  # fmt: skip


def _divides(config: ModelConfig, layout: Layout, recipe: Recipe) -> bool:
    """Whether the step is whole micro-batches, and enough of them for the schedule."""
    if recipe.batch_size % (layout.dp * layout.micro_batch_size):
        return False
    stages = layout.pp * (2 if layout.folded else 1)
    return stages <= config.num_hidden_layers and layout.micro_batches(recipe) >= stages


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, most + 1) if number % n == 0]


def search(config: ModelConfig, gpus: int, gpu: Gpu, recipe: Recipe, fixed: dict[str, Any] | None = None) -> list[Plan]:
    """All layouts that fit, the fastest first.

    Raises:
        ConfigError: there is none; the message says by how much the leanest misses and what would hold it.
    """
    fixed, plans = fixed or {}, []
    leanest: tuple[Layout, int] | None = None
    for layout in layouts(config, gpus, gpu, recipe, fixed):
        parts = memory(config, recipe, layout, gpu.node)
        total = sum(parts.values())
        if leanest is None or total < leanest[1]:
            leanest = layout, total
        if total <= gpu.memory:
            plans.append(Plan(config, recipe, gpu, layout, parts, step_time(config, recipe, layout, gpu)))
    if leanest is None:
        raise ConfigError(_indivisible(config, gpus, recipe, fixed))
    if not plans:
        holders = " or ".join(itertools.islice(_holders(config, gpus, gpu, recipe, fixed), 3))
        advice = f"it would fit {holders}" if holders else f"nor do up to {LARGEST:,} GPUs hold it"
        raise ConfigError(f"{_shortage(gpus, gpu, *leanest)}; {advice}")
    return sorted(plans, key=lambda plan: -plan.tokens_per_second_per_gpu)


def _indivisible(config: ModelConfig, gpus: int, recipe: Recipe, fixed: dict[str, Any]) -> str:
    given = ", ".join(f"{name} = {str(value).lower()}" for name, value in fixed.items())
    depth, experts = config.num_hidden_layers, config.n_routed_experts
    return (
        f"no layout divides {gpus:,} GPUs{' with ' * bool(given)}{given}: pp must divide the GPUs, the stages be at "
        f"most the {depth} layers, ep divide dp = GPUs / pp and the {experts} experts, dp times train.micro_batch_size "
        f"divide train.batch_size = {recipe.batch_size:,} into a micro-batch for each stage at least; fsdp needs pp = 1"
    )


def _shortage(gpus: int, gpu: Gpu, layout: Layout, total: int) -> str:
    return (
        f"no layout fits {gpus:,} x {gpu.name}: the leanest (pp {layout.pp}, ep {layout.ep}, dp {layout.dp}, "
        f"{'fsdp, ' * layout.fsdp}{layout.precision}) needs {total / GiB:,.1f} GiB a GPU, "
        f"{(total - gpu.memory) / GiB:,.1f} GiB more than there are"
    )


def _holders(config: ModelConfig, gpus: int, gpu: Gpu, recipe: Recipe, fixed: dict[str, Any]) -> Iterator[str]:
    """Clusters that would hold it: more of these GPUs, or as many or more of others."""
    lean = {"micro_batch_size": 1, "recompute": True} | fixed
    for other in sorted(GPUS.values(), key=lambda g: g.name != gpu.name):
        number = gpus * 2 if other.name == gpu.name else gpus
        while number <= LARGEST and not _holds(config, number, other, recipe, lean):
            number *= 2
        if number <= LARGEST:
            yield f"{number:,} x {other.name}"


def _holds(config: ModelConfig, gpus: int, gpu: Gpu, recipe: Recipe, fixed: dict[str, Any]) -> bool:
    every = (x for x in layouts(config, gpus, gpu, recipe, fixed) if x.dp == 1 or x.zero or x.fsdp or "zero" in fixed)
    return any(sum(memory(config, recipe, layout, gpu.node).values()) <= gpu.memory for layout in every)


def best_by_layout(plans: list[Plan], number: int) -> list[Plan]:
    """The fastest plan of each (pp, ep, schedule, fsdp, precision), at most `number`."""
    kinds: dict[tuple[Any, ...], Plan] = {}
    for plan in plans:
        shape = plan.layout
        kinds.setdefault((shape.pp, shape.ep, shape.schedule, shape.fsdp, shape.precision), plan)
    return list(kinds.values())[:number]


def as_settings(layout: Layout, node: int) -> list[str]:
    """The layout as overrides of `leanseek train`."""
    found = [f"parallel.pp={layout.pp}", f"parallel.ep={layout.ep}", f"parallel.schedule={layout.schedule}"]
    found += [f"parallel.{name}=true" for name in ("zero", "fsdp") if getattr(layout, name)]
    if layout.ep > node:
        found.append(f"parallel.ranks_per_node={node}")
    found.append(f"train.precision={layout.precision}")
    found.append(f"train.recompute={str(layout.recompute).lower()}")
    return [*found, f"train.micro_batch_size={layout.micro_batch_size}"]
