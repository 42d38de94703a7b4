"""Does FP8 training lose anything? The same network, data and seed in BF16 and in FP8, and with planted outliers.

    python experiments/fp8/long/run.py            from the root of a checkout; killed, it goes on where it was

Planted: at the inputs of attention's projections, the first token of every sequence is 2^14 times as large, as in the
"massive activations" of published language models (arXiv 2402.17762), and each output is divided by as much. BF16 is
not touched by that, powers of two being exact (tests/fp8/test_training.py), so its curve is the reference twice. With
a scale for each tile the other tokens keep theirs; one scale for the whole tensor leaves them few of E4M3's values.

Writes results.json, curves.csv and curves.png beside this file.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from leanseek.bench.train import machine
from leanseek.data.corpora import fetch
from leanseek.data.prepare import prepare
from leanseek.model import Transformer
from leanseek.training import RunConfig, train

HERE = Path(__file__).parent
WANTED = 0.0025  # of the loss (3.3)
OUTLIER = 2.0**14
PLANTED_STEPS = 300
WINDOW = 500  # last steps of the mean


def plant(model: Transformer) -> None:
    """Scale the first token of each sequence up before every projection of attention, and down behind it."""

    def factors(x: Tensor) -> Tensor:
        scale = torch.ones(x.shape[1], 1, dtype=x.dtype, device=x.device)
        scale[0] = OUTLIER
        return scale

    def before(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0] * factors(inputs[0])

    def behind(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output / factors(output)

    for name, module in model.named_modules():
        if name.endswith(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(behind)


def configs(shards: Path, steps: int) -> dict[str, RunConfig]:
    """The runs by name. The planted ones are the beginning of a long run: their learning rate does not decay."""
    base = RunConfig.load(str(HERE / "config.toml"), [f"data.path={shards}", f"train.steps={steps}"])
    planted = RunConfig.load(
        str(HERE / "config.toml"),
        [
            f"data.path={shards}", f"train.steps={min(steps, PLANTED_STEPS)}", "schedule.decay_start=1.0",
            "schedule.decay_end=1.0", "schedule.last_start=1.0", "balance.bias_freeze=1.0",
        ],
    )  # fmt: skip
    found = {}
    for name, run in (
        ("bf16", base), ("fp8", base), ("fp8-planted", planted), ("fp8-tensorwise-planted", planted),
    ):  # fmt: skip
        precision = name.removesuffix("-planted")
        train_config = dataclasses.replace(run.train, precision=precision)
        found[name] = dataclasses.replace(run, name=f"fp8-{name}", train=train_config)
    return found


def losses(folder: Path) -> list[float]:
    """The loss of every step, from 1; where a run was taken up again, the later row counts."""
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return [found[step] for step in sorted(found)]


def compare(reference: list[float], other: list[float]) -> dict[str, float]:
    """Means of the last steps that both have, and their relative difference."""
    stop = min(len(reference), len(other))
    a, b = (sum(x[max(0, stop - WINDOW) : stop]) / min(WINDOW, stop) for x in (reference, other))
    return {"steps": stop, "reference": a, "loss": b, "relative_difference": (b - a) / a}


def draw(curves: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, names in ((left, ("bf16", "fp8")), (right, ("bf16", "fp8-planted", "fp8-tensorwise-planted"))):
        length = min(len(curves[name]) for name in names)
        for name in names:
            x = torch.tensor(curves[name][:length])
            width = min(50, length)
            axes.plot(range(width, length + 1), x.unfold(0, width, 1).mean(1), label=name, linewidth=1)
        axes.set(xlabel="step", ylabel=f"loss, mean of {width} steps")
        axes.legend()
    left.set_title("the recipe")
    right.set_title("with planted outliers")
    figure.savefig(HERE / "curves.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--shards", type=Path, default=Path("shards/english"))
    arguments = parser.parse_args()
    if not arguments.shards.exists():
        texts = Path("corpora/english")
        if not texts.exists():
            fetch("english", texts)
        prepare([texts], arguments.shards, train_vocab=4096)
    curves: dict[str, list[float]] = {}
    for name, run in configs(arguments.shards, arguments.steps).items():
        folder = arguments.runs / run.name
        begun = (folder / "config.toml").exists()
        train(run, resume=begun, runs=arguments.runs, prepare=plant if name.endswith("planted") else None)
        curves[name] = losses(folder)
    with (HERE / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        for step in range(max(map(len, curves.values()))):
            writer.writerow([step + 1, *(x[step] if step < len(x) else "" for x in curves.values())])
    draw(curves)
    found = {name: compare(curves["bf16"], curve) for name, curve in curves.items() if name != "bf16"}
    results = {
        "experiment": "fp8", "machine": machine(), "steps": arguments.steps, "outlier": OUTLIER, "results": found,
        "wanted": WANTED, "within": abs(found["fp8"]["relative_difference"]) < WANTED,
    }  # fmt: skip
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
