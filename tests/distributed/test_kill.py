"""Runs on several ranks whose processes are killed: all stop, the last checkpoint is whole, any layout goes on from it."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from leanseek import cli, load
from leanseek.checkpoint.training import newest_checkpoint, steps_on_disk
from leanseek.distributed import watch
from leanseek.training import RunConfig, train
from leanseek.training.metrics import read_rows
from tests.small import run_toml

CONFIG = run_toml(
    {"num_hidden_layers": 4, "n_routed_experts": 8, "num_nextn_predict_layers": 1, "initializer_range": 0.05},
    name="run",
    data={"seq_len": 24},
    train={"steps": 24, "batch_size": 4, "micro_batch_size": 1, "eval_every": 12, "eval_sequences": 8},
    optimizer={"lr": 3e-3, "ema": 0.9},
    schedule={"warmup_steps": 3},
    checkpoint={"every": 5},
)
LAYOUTS = {
    "one": (1, []),
    "dp2": (2, []),
    "zero2": (2, ["parallel.zero=true"]),
    "zero3": (3, ["parallel.zero=true"]),
    "ep2": (2, ["parallel.ep=2"]),
    "ep4zero": (4, ["parallel.ep=4", "parallel.zero=true"]),
    "pp2": (2, ["parallel.pp=2", "parallel.schedule=1f1b"]),
    "pp2v": (2, ["parallel.pp=2", "parallel.schedule=dualpipev"]),
    "pp2ep2": (4, ["parallel.pp=2", "parallel.ep=2", "parallel.zero=true", "parallel.schedule=zb1p"]),
}
pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("quick_runs")]


@pytest.fixture(scope="module")
def place(run_folder: Callable[[str], Path]) -> Path:
    """A folder with shards and a configuration."""
    return run_folder(CONFIG)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that one process went through with."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    train(RunConfig.load(str(place / "run.toml"), [f"data.path={place / 'shards'}"]), runs=folder)
    return folder / "run"


def start(place: Path, folder: Path, layout: str, *flags: str) -> list[BaseProcess]:
    """The command on every rank, each a fork of this process; what rank 1 says is in folder/said-1."""
    ranks, settings = LAYOUTS[layout]
    for old in folder.glob("said-*"):
        old.unlink()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def run(rank: int) -> None:
        os.chdir(folder)
        torch.set_num_threads(1)
        watch.BEAT = 0.25  # a killed rank is found silent four times as soon
        faulthandler.dump_traceback_later(200, file=open(f"stack-{rank}", "w", encoding="utf-8"))  # noqa: SIM115
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        sys.stdout = sys.stderr = open(f"said-{rank}", "w", encoding="utf-8")  # noqa: SIM115
        data = f"data.path={place / 'shards'}"
        sys.argv = ["leanseek", "train", str(place / "run.toml"), data, *settings, *flags]
        cli.main()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def wait_for(processes: list[BaseProcess], moment: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 300
    while not moment():
        assert all(p.is_alive() for p in processes), said(folder, len(processes))
        assert time.monotonic() < deadline, said(folder, len(processes))
        time.sleep(0.0005)


def said(folder: Path, ranks: int) -> str:
    """What the ranks said, and where they were if they took too long."""
    files = (folder / f"{kind}-{rank}" for kind in ("said", "stack") for rank in range(ranks))
    return "\n".join(file.read_text(encoding="utf-8")[-3000:] for file in files)


def end(processes: list[BaseProcess]) -> list[int | None]:
    """The exit codes of all, None of those that had to be killed for not ending by themselves."""
    deadline = time.monotonic() + 300  # a rank that waits for a lost one would go on for 900
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def begun(folder: Path) -> float:
    """When the ranks that were started last began to train; infinity before that."""
    said = folder / "said-0"
    return said.stat().st_mtime if said.exists() and " at step " in said.read_text() else math.inf


def writing(folder: Path) -> bool:
    """Whether they write a checkpoint; others may have left one half written."""
    with contextlib.suppress(FileNotFoundError):  # it has its name meanwhile
        return any(p.stat().st_mtime > begun(folder) for p in folder.glob("runs/run/checkpoints/.step-*.partial"))
    return False


def trained(folder: Path, steps: int) -> bool:
    """Whether they have done so many steps."""
    if begun(folder) == math.inf:
        return False
    *_, rows = re.split('"event": "(?:started|resumed)"', (folder / "runs/run/metrics.jsonl").read_text())
    return rows.count('"loss"') >= steps


def same_run(run: Path, whole: Path) -> None:
    """Every step once, with the losses of one process, and its weights at the end."""
    assert [step for step, _ in losses(run)] == [step for step, _ in losses(whole)]
    np.testing.assert_allclose([x for _, x in losses(run)], [x for _, x in losses(whole)], rtol=2e-6)
    ours, theirs = load(run).state_dict(), load(whole).state_dict()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "layouts",
    [
        ("pp2", "ep2", "one"),
        pytest.param(("one", "ep4zero", "pp2v"), marks=pytest.mark.slow),
        pytest.param(("pp2ep2", "dp2", "zero3"), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_in_other_layouts(layouts: tuple[str, ...], place: Path, whole: Path, tmp_path: Path) -> None:
    """And each layout's checkpoints are those of one process."""
    for number, layout in enumerate(layouts):
        processes = start(place, tmp_path, layout, *["--resume"] * (number > 0))
        if number < 2:
            wait_for(processes, lambda: trained(tmp_path, 6), tmp_path)
            os.kill(int(str(processes[-1].pid)), signal.SIGTERM)
            assert set(end(processes)) == {130}, said(tmp_path, len(processes))
        else:
            assert set(end(processes)) == {0}, said(tmp_path, len(processes))
    same_run(tmp_path / "runs/run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_rank_stops_all_and_the_run_goes_on_in_a_smaller_layout(
    seed: int, place: Path, whole: Path, tmp_path: Path
) -> None:
    """Killed while a checkpoint is written, and at any other instant; a rank that writes and one that does not."""
    rng, run = random.Random(seed), tmp_path / "runs/run"
    layouts = [["zero3", "zero3", "zero2", "zero2", "one"], ["ep4zero", "ep4zero", "pp2", "pp2v", "ep2"]][seed % 2]
    for number, layout in enumerate(layouts):
        if number:  # ranks killed while they write one leave it behind
            (run / f"checkpoints/.step-{5 * number}.partial").mkdir(parents=True, exist_ok=True)
        processes = start(place, tmp_path, layout, *["--resume"] * (number > 0))
        if number == len(layouts) - 1:
            assert set(end(processes)) == {0}, said(tmp_path, len(processes))
            break
        steps = rng.randrange(1, 6)
        wait_for(
            processes, lambda n=steps, odd=number % 2: writing(tmp_path) if odd else trained(tmp_path, n), tmp_path
        )
        time.sleep(rng.random() * 0.02)
        victim = rng.randrange(len(processes))
        processes[victim].kill()
        codes = end(processes)
        assert None not in codes, f"ranks went on after rank {victim} was killed: {said(tmp_path, len(processes))}"
        assert codes[victim] == -signal.SIGKILL
        assert all(code == 1 for rank, code in enumerate(codes) if rank != victim), said(tmp_path, len(processes))
        if steps_on_disk(run):
            found, passed = newest_checkpoint(run)
            assert found is not None
            assert not passed
    same_run(run, whole)
