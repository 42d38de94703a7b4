"""A small V3 learns to look codes up in 512 tokens and is taken to 2,048 and 8,192: with YaRN, and with plain RoPE.

    python experiments/long-context/run.py TEXTS RUNS          # what is there is not done again; a killed run goes on
    python experiments/long-context/run.py TEXTS RUNS --draw   # results.json and pictures of what has been measured

TEXTS is a folder of .txt files, such as `leanseek data fetch shakespeare` makes. Every stage is a run of `train` with
the weights of the one before (`from`). Needle maps of the checkpoints of both arms say how many steps a length takes
to become green.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch
from data import KINDS, corpus, documents, write_tokenizer

from leanseek import LLM, Transformer, load, save
from leanseek.checkpoint import resolve
from leanseek.config import ModelConfig, merged
from leanseek.data.loader import TokenDataset
from leanseek.data.prepare import prepare
from leanseek.data.tokenizer import load_tokenizer
from leanseek.evaluation import needle
from leanseek.evaluation.scoring import Scorer
from leanseek.plotting import Figure
from leanseek.reading import read_toml
from leanseek.reproduce.experts import bits_per_byte
from leanseek.reproduce.worker import commit, machine
from leanseek.training import RunConfig, train
from leanseek.training.metrics import read_rows
from leanseek.writing import replace_file

HERE = Path(__file__).parent
LENGTHS = (512, 2048, 8192)
TASKS = ("needle", "needle_multikey")
YARN = {  # the same in both phases (4.3)
    "rope_scaling": {"factor": 20.0, "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 1.0}
}


class Stage(NamedTuple):
    name: str
    data: str  # key of KINDS
    source: str  # the stage it begins with
    changes: dict[str, Any]
    every: int = 1000  # steps between checkpoints
    measured: bool = True  # each of these, its needle maps and bits per byte
    arm: str = ""


def stages() -> Iterator[Stage]:
    """In the order in which they run: names, look-up, pre-training, then both phases of each arm."""
    first = {"schedule": {"final_lr": 1.5e-3, "last_lr": 1.5e-3}, "train": {"steps": 1500, "batch_size": 16}}
    yield Stage("names", "names", "begin", first, measured=False)
    yield Stage("lookup", "lookup", "names", first, measured=False)
    yield Stage("base", "base", "lookup", {"train": {"steps": 4000, "batch_size": 4}})
    constant = {"optimizer": {"lr": 3e-4}, "schedule": {"warmup_steps": 0, "final_lr": 3e-4, "last_lr": 3e-4}}
    for arm, rope in (("yarn", YARN), ("plain", {})):
        for length, source, batch, steps, every in (("2k", "base", 8, 80, 20), ("8k", f"{arm}-2k", 2, 240, 120)):
            changes = {
                "model": {"max_position_embeddings": 10240, **rope},
                "train": {"batch_size": batch, "steps": steps, "eval_every": steps},
            }
            yield Stage(f"{arm}-{length}", length, source, merged([constant, changes]), every, arm=arm)


def shards(texts: Path, runs: Path, name: str) -> Path:
    """The prepared data of a stage; all have one tokenizer."""
    data = runs / "data"
    data.mkdir(parents=True, exist_ok=True)
    if not (data / "tokenizer/tokenizer.json").is_file():
        write_tokenizer(data / "tokenizer", texts)
    if not (data / name / "manifest.json").is_file():
        prepare([rows(texts, data, name)], data / name, tokenizer=data / "tokenizer", workers=1)
    return data / name


def rows(texts: Path, data: Path, name: str) -> Path:
    """The documents of a stage."""
    path = data / f"{name}.jsonl"
    if not path.is_file():
        made = documents(texts, KINDS[name], 1 + list(KINDS).index(name), load_tokenizer(data / "tokenizer"))
        lines = (json.dumps({"text": text}) for text in itertools.islice(made, KINDS[name].documents))
        replace_file(path, "\n".join(lines).encode())
    return path


def settings(stage: Stage, texts: Path, runs: Path) -> RunConfig:
    data = {"path": str(shards(texts, runs, stage.data)), "seq_len": KINDS[stage.data].window}
    table = merged([read_toml(HERE / "config.toml"), stage.changes, {"name": stage.name, "data": data}])
    table |= {"checkpoint": {"every": stage.every, "keep_every": stage.every}, "from": str(runs / stage.source)}
    config = runs / f"{stage.name}.toml"
    config.write_text(tomli_w.dumps(table), encoding="utf-8")
    return RunConfig.load(str(config), [], runs)


def measure(checkpoint: Path, text: str, held_out: Path, longest: int) -> None:
    """Maps of one code and of several, and bits per byte in windows of 512, kept beside the checkpoint."""
    kept = checkpoint.parent / f"{checkpoint.name}.measured.json"
    if not kept.is_file():
        scorer = Scorer(LLM(checkpoint, packed_copy=False))
        lengths = [length for length in LENGTHS if length <= longest]
        maps = {task: needle.find(scorer, task, lengths, text=text) for task in TASKS}
        found: dict[str, Any] = {task: [cell._asdict() for cell in cells] for task, cells in maps.items()}
        found["bits_per_byte"] = bits_per_byte(load(checkpoint), TokenDataset(held_out, "validation", 512, 1), 64)
        replace_file(kept, json.dumps(found).encode())


def begin(runs: Path) -> None:
    """Initial weights, in which two things make look-up learnable in minutes (docs/log.md). Embeddings are as large as
    what a layer adds to them, so that a name is still read behind the first layer. And they have a vector in common:
    V3's queries and keys have no bias, so a head that looks at a place, whatever stands there, can be made of nothing
    else."""
    if not (runs / "begin").is_dir():
        model = Transformer(ModelConfig(**read_toml(HERE / "config.toml")["model"]))
        model.init_weights(0)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            model.embed_tokens.weight.normal_(generator=generator)
            model.embed_tokens.weight += torch.randn(model.config.hidden_size, generator=generator)
        save(model, runs / "begin", tokenizer_from=runs / "data/tokenizer")


def untrained(runs: Path, arm: str) -> Path:
    """base's last checkpoint under the config of an arm: the weights as they are."""
    folder = runs / f"untrained-{arm}"
    if not folder.is_dir():
        model, long = load(runs / "base"), RunConfig.from_dict(read_toml(runs / f"{arm}-2k/config.toml")).model
        model.config = dataclasses.replace(model.config, rope_scaling=long.rope_scaling, max_position_embeddings=10240)
        save(model, folder, tokenizer_from=resolve(runs / "base"))
    return folder


def results(runs: Path) -> dict[str, Any]:
    """What has been measured, by stage and step, and each stage's loss."""
    found: dict[str, Any] = {"measured": {}, "loss": {}, "machine": machine(), "commit": commit()}
    for folder in sorted(p.parent for p in runs.glob("*/metrics.jsonl")):
        rows = read_rows(folder / "metrics.jsonl")
        found["loss"][folder.name] = [[r["step"], round(r["loss"], 4)] for r in rows if r.get("loss") is not None][::10]
        kept = {int(p.name.split(".")[0].removeprefix("step-")): p for p in folder.glob("checkpoints/*.measured.json")}
        if kept:
            found["measured"][folder.name] = {step: json.loads(kept[step].read_bytes()) for step in sorted(kept)}
    for path in runs.glob("untrained-*.measured.json"):
        found["measured"][path.name.split(".")[0]] = {0: json.loads(path.read_bytes())}
    return found


def at(cells: list[dict[str, float]], length: int) -> list[dict[str, float]]:
    return [cell for cell in cells if cell["length"] == length]


def share(cells: list[dict[str, float]]) -> float:
    """Of the needles that were found."""
    return sum(cell["accuracy"] for cell in cells) / len(cells)


def draw(measured: dict[str, Any], out: Path) -> None:
    """needles.png: the maps after each stage. steps.png: the share of codes found, by step of each arm."""
    maps = ("untrained-plain", "plain-2k", "plain-8k", "untrained-yarn", "yarn-2k", "yarn-8k")
    names = [name for name in maps if name in measured]
    if not names:
        return
    figure = Figure(figsize=(0.6 + 2.4 * len(names), 6.8), layout="constrained")
    for row, task in zip(figure.subplots(len(TASKS), len(names), squeeze=False), TASKS, strict=True):
        for axes, name in zip(row, names, strict=True):
            cells = measured[name][max(measured[name])][task]
            needle.draw(axes, [needle.Cell(**cell) for cell in cells], f"{name}\n{task}")
    figure.savefig(out / "needles.png", dpi=110)

    panels = [(task, length) for task in TASKS for length in LENGTHS[1:]]
    figure = Figure(figsize=(0.5 + 3 * len(panels), 3.2), layout="constrained")
    for axes, (task, length) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for arm in ("yarn", "plain"):
            points = {step: at(each[task], length) for step, each in by_step(measured, arm).items()}
            shares = {step: share(cells) for step, cells in points.items() if cells}
            axes.plot(list(shares), list(shares.values()), "o-", markersize=3, label=arm)
        axes.axhline(needle.GREEN, color="gray", linewidth=0.5)
        axes.set(xlabel="steps", xlim=(-5, None), ylim=(-0.02, 1.02), title=f"{task}, {length:,} tokens")
        axes.legend()
    figure.savefig(out / "steps.png", dpi=110)


def by_step(measured: dict[str, Any], arm: str) -> dict[int, Any]:
    """Both phases of an arm, one after the other, and before the first step."""
    points = dict(measured.get(f"untrained-{arm}", {}))
    for phase in ("2k", "8k"):
        before = max(points, default=0)
        points |= {before + step: each for step, each in measured.get(f"{arm}-{phase}", {}).items()}
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--draw", action="store_true", help="only that")
    given = parser.parse_args()
    torch.set_num_threads(1)
    texts, runs = given.texts, given.runs
    if not given.draw:
        extend(texts, runs)
    found = results(runs)
    replace_file(HERE / "results.json", (json.dumps(found) + "\n").encode())
    draw(found["measured"], HERE)


def extend(texts: Path, runs: Path) -> None:
    """Run and measure all stages."""
    text, held_out = corpus(texts), shards(texts, runs, "base")
    begin(runs)  # with the tokenizer that the shards have made
    for stage in stages():
        run = settings(stage, texts, runs)
        train(run, resume=(runs / stage.name).is_dir(), runs=runs)
        for step in range(stage.every, run.train.steps + 1, stage.every) if stage.measured else ():
            measure(runs / stage.name / "checkpoints" / f"step-{step}", text, held_out, run.data.seq_len)
        if stage.arm and stage.source == "base":
            measure(untrained(runs, stage.arm), text, held_out, run.data.seq_len)


if __name__ == "__main__":
    main()
