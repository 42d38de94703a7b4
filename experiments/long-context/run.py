"""A small V3 learns to look things up in 512 tokens and is taken to 2,048 and 8,192: with YaRN, and with plain RoPE.

    python run.py TEXTS RUNS          # what is there is not done again; a killed run goes on where it was
    python run.py TEXTS RUNS --draw   # results.json and needles.png from what has been measured so far

TEXTS is a folder of .txt files, such as `leanseek data fetch shakespeare` makes. Every stage is a run of `train` with
the weights of the one before (`from`). Needle maps of the checkpoints of both arms say how many steps a length takes
to become green. docs/long-context.md says what of this has run so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch
from data import write

from leanseek import LLM, load, save
from leanseek.checkpoint import resolve
from leanseek.config import merged
from leanseek.data.prepare import prepare
from leanseek.evaluation import needle
from leanseek.evaluation.scoring import Scorer
from leanseek.plotting import Figure
from leanseek.reading import read_toml
from leanseek.training import RunConfig, train
from leanseek.training.metrics import read_rows
from leanseek.writing import replace_file

HERE = Path(__file__).parent
VOCABULARY = 1024
WINDOWS = {"lookup": 64, "base": 512, "2k": 2048, "8k": 8192}  # of the documents that each stage trains on
DOCUMENTS = {"lookup": 12000, "base": 4000, "2k": 1200, "8k": 300}
SHARES = {"lookup": 1.0, "base": 0.3, "2k": 0.3, "8k": 0.3}  # of rows made for looking things up
LENGTHS = (512, 2048, 8192)
YARN = {  # the same in both phases (4.3)
    "rope_scaling": {"factor": 20.0, "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 1.0}
}


class Stage(NamedTuple):
    name: str
    data: str  # key of WINDOWS
    source: str  # the stage it begins with, "" for none
    every: int  # steps between checkpoints, whose maps are measured
    changes: dict[str, Any]


def stages() -> Iterator[Stage]:
    """In the order in which they run: pre-training, then both phases of each arm."""
    first = {"data": {"seq_len": 64}, "train": {"steps": 1500, "batch_size": 32}, "optimizer": {"lr": 3e-3}}
    yield Stage("lookup", "lookup", "", 100, first)
    yield Stage("base", "base", "lookup", 100, {"train": {"steps": 600}})
    for arm, rope in (("yarn", YARN), ("plain", {})):
        constant = {"optimizer": {"lr": 3e-4}, "schedule": {"warmup_steps": 0, "final_lr": 3e-4, "last_lr": 3e-4}}
        for length, source, batch, steps in (("2k", "base", 8, 80), ("8k", f"{arm}-2k", 2, 50)):
            window = WINDOWS[length]
            changes = {
                "model": {"max_position_embeddings": 10240, **rope},
                "data": {"seq_len": window},
                "train": {"batch_size": batch, "steps": steps, "eval_every": steps, "recompute": True},
            }
            yield Stage(f"{arm}-{length}", length, source, 10, merged([constant, changes]))


def shards(texts: Path, runs: Path, name: str) -> Path:
    """The prepared data of a stage; all have the tokenizer of base's."""
    folder, rows = runs / "shards" / name, runs / "shards" / f"{name}.jsonl"
    if not (folder / "manifest.json").is_file():
        rows.parent.mkdir(parents=True, exist_ok=True)
        write(rows, texts, WINDOWS[name], DOCUMENTS[name], SHARES[name], seed=list(WINDOWS).index(name))
        if name == "base":
            prepare([rows], folder, train_vocab=VOCABULARY, workers=1)
        else:
            prepare([rows], folder, tokenizer=shards(texts, runs, "base"), workers=1)
    return folder


def settings(stage: Stage, texts: Path, runs: Path) -> RunConfig:
    table = merged([read_toml(HERE / "config.toml"), stage.changes])
    table = merged([table, {"name": stage.name, "data": {"path": str(shards(texts, runs, stage.data))}}])
    table |= {"checkpoint": {"every": stage.every, "keep_every": stage.every}}
    if stage.source:
        table["from"] = str(runs / stage.source)
    config = runs / f"{stage.name}.toml"
    config.write_text(tomli_w.dumps(table), encoding="utf-8")
    return RunConfig.load(str(config), [], runs)


def measure(checkpoint: Path, text: str, lengths: tuple[int, ...]) -> None:
    """Maps of one code and of several, kept beside the checkpoint."""
    kept = checkpoint.parent / f"{checkpoint.name}.needles.json"
    if not kept.is_file():
        scorer = Scorer(LLM(checkpoint, packed_copy=False))
        maps = {task: needle.find(scorer, task, lengths, text=text) for task in ("needle", "needle_multikey")}
        replace_file(kept, json.dumps({task: [c._asdict() for c in cells] for task, cells in maps.items()}).encode())


def untrained(runs: Path) -> Path:
    """base's last checkpoint under the config of the YaRN arm: the weights as they are."""
    folder = runs / "untrained"
    if not folder.is_dir():
        model, long = load(runs / "base"), RunConfig.from_dict(read_toml(runs / "yarn-2k/config.toml")).model
        model.config = dataclasses.replace(model.config, rope_scaling=long.rope_scaling, max_position_embeddings=10240)
        save(model, folder, tokenizer_from=resolve(runs / "base"))
    return folder


def results(runs: Path) -> dict[str, Any]:
    """What has been measured, by stage and step; bits per byte of each stage's last evaluation."""
    found: dict[str, Any] = {"maps": {}, "bits_per_byte": {}, "loss": {}}
    for folder in sorted(p.parent for p in runs.glob("*/metrics.jsonl")):
        rows = read_rows(folder / "metrics.jsonl")
        found["loss"][folder.name] = [[r["step"], round(r["loss"], 4)] for r in rows if r.get("loss") is not None]
        found["bits_per_byte"][folder.name] = [
            [r["step"], r["val_bits_per_byte"]] for r in rows if "val_bits_per_byte" in r
        ]
        for kept in folder.glob("checkpoints/step-*.needles.json"):
            step = int(kept.name.split(".")[0].removeprefix("step-"))
            found["maps"].setdefault(folder.name, {})[step] = json.loads(kept.read_bytes())
    if (runs / "untrained.needles.json").is_file():
        found["maps"]["untrained"] = {0: json.loads((runs / "untrained.needles.json").read_bytes())}
    return found


def draw(found: dict[str, Any], out: Path) -> None:
    """The last map of every stage that has one."""
    maps = {name: by_step[max(by_step)]["needle"] for name, by_step in found["maps"].items()}
    if not maps:
        return
    figure = Figure(figsize=(0.6 + 3.0 * len(maps), 3.6), layout="constrained")
    for axes, (name, cells) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        needle.draw(axes, [needle.Cell(**cell) for cell in cells], name)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--draw", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = " ".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(given.texts.glob("*.txt")))
    for stage in [] if given.draw else stages():
        given.runs.mkdir(parents=True, exist_ok=True)
        run = settings(stage, given.texts, given.runs)
        train(run, resume=(given.runs / stage.name).is_dir(), runs=given.runs)
        lengths = tuple(n for n in LENGTHS if n <= run.model.max_position_embeddings)
        steps = range(stage.every, run.train.steps + 1, stage.every) if "-" in stage.name else (run.train.steps,)
        for step in steps if stage.name != "lookup" else ():
            measure(given.runs / stage.name / "checkpoints" / f"step-{step}", text, lengths)
        if stage.name == "yarn-2k":
            measure(untrained(given.runs), text, LENGTHS)
    found = results(given.runs)
    replace_file(HERE / "results.json", (json.dumps(found, indent=1) + "\n").encode())
    draw(found, HERE / "needles.png")


if __name__ == "__main__":
    main()
