"""A run survives: kill -9 at any instant, signals, a full disk, a corrupt checkpoint, numbers that are not finite."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from leanseek import cli, load
from leanseek.checkpoint import writer as checkpoints
from leanseek.checkpoint.pieces import Spread
from leanseek.checkpoint.training import newest_checkpoint, open_state, read_checkpoint, steps_on_disk
from leanseek.cli import app
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.data.loader import TokenDataset
from leanseek.data.prepare import prepare
from leanseek.errors import RunError
from leanseek.training import RunConfig, Summary, loop, pace, train, trainer
from leanseek.training.metrics import read_rows
from leanseek.training.part import Part
from leanseek.training.trainer import Trainer
from tests.small import forked, kill_when, rewound, run_toml, wait_for

CONFIG = run_toml(
    {"n_routed_experts": 8, "initializer_range": 0.05},
    name="run",
    data={"seq_len": 24, "fim_rate": 0.3},
    train={
        "steps": 24,
        "batch_size": 4,
        "batch_size_start": 2,
        "ramp": 0.5,
        "micro_batch_size": 3,
        "eval_every": 8,
        "eval_sequences": 8,
    },
    optimizer={"lr": 3e-3, "ema": 0.9},
    schedule={"warmup_steps": 3},
    checkpoint={"every": 5},
)
pytestmark = pytest.mark.usefixtures("quick_runs")
CLOCKS = ("tokens_per_second", "flops_per_second", "mfu", "elapsed_s")


@pytest.fixture(scope="module")
def place(run_folder: Callable[[str], Path]) -> Path:
    """A folder with shards and a configuration."""
    return run_folder(CONFIG)


@pytest.fixture
def go(place: Path, tmp_path: Path) -> Callable[..., Summary]:
    """go("section.key=value", ...): train in this process, into tmp_path/run."""

    def run(*overrides: str, resume: bool = False, runs: Path = tmp_path) -> Summary:
        return train(config(place, *overrides), resume=resume, runs=runs)

    return run


def config(place: Path, *overrides: str) -> RunConfig:
    return RunConfig.load(str(place / "run.toml"), [f"data.path={place / 'shards'}", *overrides])


def history(run: Path) -> list[dict]:
    """Rows of metrics.jsonl without clocks and events."""
    rows = read_rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows if "event" not in row]


def events(run: Path) -> list[str]:
    return [row["event"] for row in read_rows(run / "metrics.jsonl") if "event" in row]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    train(config(place), runs=folder)
    return folder / "run"


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(whole, tmp_path / "run")


# ---- kill -9, signals ----


def command(place: Path, *flags: str) -> list[str]:
    return ["train", str(place / "run.toml"), f"data.path={place / 'shards'}", *flags]


def start(place: Path, folder: Path, *flags: str) -> BaseProcess:
    """The command in a fork of this process, which has imported everything; what it says is in folder/said."""

    def run() -> None:
        os.chdir(folder)
        sys.stdout = sys.stderr = open("said", "w", encoding="utf-8")  # noqa: SIM115
        sys.argv = ["leanseek", *command(place, *flags)]
        cli.main()

    return forked(run)


def end(child: BaseProcess, number: int) -> int | None:
    """Its exit code after that signal."""
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join(60)
    return child.exitcode


def rows(run: Path, count: int) -> bool:
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= count


def partial(run: Path) -> bool:
    return any(run.glob("checkpoints/.step-*.partial"))


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(place: Path, whole: Path, tmp_path: Path) -> None:
    """Losses, gradient norms, loads, violations, validation: all numbers of every row, and in the end every weight.

    Killed while the first checkpoint is written, and between two; gone on with by a process of its own.
    """
    run = tmp_path / "runs/run"
    for number, moment in enumerate((lambda: partial(run), lambda: rows(run, 16))):
        child = start(place, tmp_path, *["--resume"] * (number > 0))
        kill_when(child, moment)
    last = subprocess.run(
        [sys.executable, "-m", "leanseek", *command(place, "--resume", "--json")],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert last.returncode == 0, last.stderr
    assert json.loads(last.stdout)["step"] == 24
    assert "resumed at step" in last.stderr
    assert history(run) == history(whole)
    for name in ("model.safetensors", "state.safetensors"):
        assert (run / "checkpoints/step-24" / name).read_bytes() == (whole / "checkpoints/step-24" / name).read_bytes()
    assert (run / "report.html").stat().st_size > 10_000


def test_a_signal_leaves_a_checkpoint_of_the_step_reached_and_exits_130(
    place: Path, whole: Path, tmp_path: Path, go: Callable[..., Summary]
) -> None:
    run = tmp_path / "runs/run"
    child = start(place, tmp_path)
    wait_for(child, lambda: rows(run, 8))
    assert end(child, signal.SIGTERM) == 130
    step, said = steps_on_disk(run)[-1], (tmp_path / "said").read_text()
    assert f"stopped at step {step}; continue with --resume" in said
    assert "Traceback" not in said
    assert history(run) == [row for row in history(whole) if row["step"] <= step]
    go(resume=True, runs=tmp_path / "runs")
    assert history(run) == history(whole)


# ---- what a run leaves behind ----


def test_rows_carry_what_others_read(whole: Path) -> None:
    found = history(whole)
    trained, validated = [r for r in found if "loss" in r], [r for r in found if "val_loss" in r]
    raw = read_rows(whole / "metrics.jsonl")
    assert [r["step"] for r in trained] == list(range(1, 25))
    assert [r["step"] for r in validated] == [8, 16, 24]
    keys = {"tokens", "loss", "lr", "grad_norm", "max_violation", "mtp_loss", "balance_loss", "batch_size", "load"}
    assert all(keys <= set(row) for row in trained)
    assert all(set(CLOCKS) <= set(row) for row in raw if "loss" in row)
    assert all({"val_bits_per_byte", "val_mtp_loss"} <= set(row) for row in validated)
    assert trained[-1]["tokens"] == sum(row["batch_size"] for row in trained) * 24
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in trained[-1]["load"].values())
    assert any((whole / "tensorboard").iterdir())


def test_a_checkpoint_is_a_model_folder(whole: Path) -> None:
    model = load(whole)
    assert (whole / "checkpoints/step-24/tokenizer.json").is_file()
    assert model.layers[1].mlp.gate.e_score_correction_bias.abs().max() > 0
    assert model(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


def test_a_run_is_not_overwritten_and_keeps_its_network(finished: Path, go: Callable[..., Summary]) -> None:
    with pytest.raises(ValueError, match="continue it with --resume"):
        go()
    for changed in ("hidden_size=64", "rope_theta=5000.0", "eos_token_id=[1, 2]"):
        key = changed.partition("=")[0]
        with pytest.raises(ValueError, match=rf"model\.{key} = .*, but .* has .*; a run keeps its network"):
            go(f"model.{changed}", resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        go("name=other", resume=True)


def test_resume_begins_a_run_that_was_killed_before_its_first_file(
    tmp_path: Path, whole: Path, go: Callable[..., Summary]
) -> None:
    (tmp_path / "run").mkdir()
    for left in (".lock", ".config.toml.partial"):
        (tmp_path / "run" / left).write_text("")
    go(resume=True)
    assert history(tmp_path / "run") == history(whole)


def test_resuming_a_finished_run_changes_nothing(finished: Path, whole: Path, go: Callable[..., Summary]) -> None:
    done = go(resume=True)
    assert history(finished) == history(whole)
    assert done.val_loss == history(whole)[-1]["val_loss"]
    assert done.tokens == history(whole)[-1]["tokens"]


# ---- FP8 ----


FP8 = ("train.precision=fp8", "train.dtype=bfloat16", "train.steps=12", "checkpoint.keep_last=5")


def test_a_run_in_fp8_resumes_bit_for_bit(go: Callable[..., Summary], tmp_path: Path) -> None:
    go(*FP8)
    again = rewound(tmp_path / "run", 5, tmp_path / "again")
    go(*FP8, resume=True, runs=again.parent)
    assert history(again) == history(tmp_path / "run")
    found, expected = (read_checkpoint(run / "checkpoints/step-12") for run in (again, tmp_path / "run"))
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name].read(), t.read()) for name, t in expected.tensors.items())
    weights, others = load(again).state_dict(), load(tmp_path / "run").state_dict()
    assert all(torch.equal(weights[name], t) for name, t in others.items())


def test_a_run_goes_from_bf16_to_fp8_and_back(go: Callable[..., Summary], tmp_path: Path) -> None:
    """With nothing to convert: a checkpoint holds the same float32 weights whatever multiplied them."""
    bf16 = ("train.precision=bf16", *FP8[1:])
    go(*bf16)
    mixed = rewound(tmp_path / "run", 5, tmp_path / "mixed")
    go(*FP8, resume=True, runs=mixed.parent)
    switched = history(mixed)
    assert switched != history(tmp_path / "run")  # from step 6 on it did run in FP8
    back = rewound(mixed, 10, tmp_path / "back")
    go(*bf16, resume=True, runs=back.parent)
    first, then, last = history(tmp_path / "run"), switched, history(back)
    for row, other in zip(last, then, strict=True):
        assert row["step"] > 10 or row == other
    assert [row["loss"] for row in last if row.get("step", 0) > 10 and "loss" in row] != [
        row["loss"] for row in then if row.get("step", 0) > 10 and "loss" in row
    ]
    for row, other in zip(last, first, strict=True):
        if "loss" in row:
            assert abs(row["loss"] - other["loss"]) < 0.05 * other["loss"]


# ---- broken checkpoints, full disks ----


def test_a_corrupt_checkpoint_is_passed_over_with_a_line(
    finished: Path, whole: Path, go: Callable[..., Summary], capsys: pytest.CaptureFixture[str]
) -> None:
    with (finished / "checkpoints/step-24/state.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff\x00\xff\x00")
    go(resume=True)
    assert "step-24/state.safetensors is missing, truncated or corrupt" in capsys.readouterr().err
    assert events(finished)[-2:] == ["passed_over", "resumed"]
    assert history(finished) == history(whole)
    assert steps_on_disk(finished) == [20, 24]
    assert read_checkpoint(finished / "checkpoints/step-24").step == 24


def test_without_a_whole_checkpoint_nothing_is_resumed(finished: Path, go: Callable[..., Summary]) -> None:
    for step in steps_on_disk(finished):
        (finished / f"checkpoints/step-{step}/state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint .* is whole"):
        go(resume=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 8 MB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 200_000], ids=["for nothing", "for metrics"])
def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(
    go: Callable[..., Summary], disk: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """A disk that is really full where we may mount one, else a write that fails as one does."""
    runs = disk or tmp_path
    go("train.steps=5", runs=runs)
    if disk:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(bytes(max(0, free - room)))
        if not room:  # the last page of metrics.jsonl has room for a row or two
            with (disk / "crumbs").open("ab", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(100))
    else:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoints, "write_file", full)
    with pytest.raises(RunError, match="is full") as caught:
        go("train.steps=400", "checkpoint.every=10", resume=True, runs=runs)
    assert str(runs if disk else "/") in str(caught.value)
    assert "make room; checkpoints/step-5 is whole: continue with --resume" in str(caught.value)
    found, passed = newest_checkpoint(runs / "run")
    assert found is not None
    assert found.step == 5
    assert not passed
    assert not partial(runs / "run")
    if disk:
        (disk / "ballast").unlink()
    monkeypatch.undo()
    assert go("train.steps=10", resume=True, runs=runs).step == 10
    assert [row["step"] for row in history(runs / "run") if "loss" in row] == list(range(1, 11))


# ---- numbers that are not finite ----


def test_a_loss_that_stays_nonfinite_ends_the_run_and_reaches_no_checkpoint(
    go: Callable[..., Summary], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"step \d+: output of .* is not finite .* (there is no checkpoint|is whole)"):
        go("optimizer.lr=1e30", "optimizer.weight_decay=0", "schedule.warmup_steps=0", "checkpoint.every=1")
    run = tmp_path / "run"
    assert events(run).count("skipped") == 3
    for step in steps_on_disk(run):
        folder = run / f"checkpoints/step-{step}"
        read_checkpoint(folder)
        assert all(p.isfinite().all() for p in load(folder).parameters())


def test_a_weight_that_is_not_finite_reaches_no_checkpoint(
    go: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step whose loss and gradients are finite may still overflow a weight."""
    monkeypatch.setattr(trainer, "learning_rate", lambda run, step: 1e39)  # no configuration may say so
    with pytest.raises(
        RunError, match=r"is not finite, so no checkpoint was written.*there is no checkpoint to resume"
    ):
        go("schedule.warmup_steps=0", "checkpoint.every=1", "train.eval_every=9")
    assert steps_on_disk(tmp_path / "run") == []


def test_a_single_bad_step_is_left_out_and_the_run_goes_on(
    go: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def sometimes(self: Trainer, batch: Batch, number: int):  # type: ignore[no-untyped-def]
        weight = self.model.layers[0].mlp.up_proj.weight
        hook = weight.register_hook(lambda g: g * (float("inf") if number == 4 else 1.0))
        result = step(self, batch, number)
        hook.remove()
        return result

    monkeypatch.setattr(Trainer, "step", sometimes)
    assert go("train.steps=8").step == 8
    found = read_rows(tmp_path / "run/metrics.jsonl")
    message = next(row["message"] for row in found if row.get("event") == "skipped")
    assert message.startswith("step 5: gradient of layers.0.mlp.up_proj.weight is not finite")
    assert [row["grad_norm"] is None for row in found if "loss" in row] == [False] * 4 + [True] + [False] * 3
    assert read_checkpoint(tmp_path / "run/checkpoints/step-5").state["skipped"] == 1


# ---- how fast ----


@pytest.mark.parametrize(
    ("probes", "best"),
    [
        ([1.0], 0.0),  # something else took the machine, whenever it was measured: the steps themselves are better
        ([1.0, 1e15, 1.0], 1e15),  # the best that was seen, from then on
        ([1e16, 1e15], 1e16),
    ],
)
def test_no_step_is_faster_than_the_machine(
    probes: list[float], best: float, go: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(probes)
    monkeypatch.setattr(loop, "gemm_rate", lambda *_, **__: left.pop(0) if len(left) > 1 else left[0])
    go("train.steps=9", "train.eval_every=3")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "mfu" in row]
    assert len(rows) == 9 and all(0 < row["mfu"] <= 1 for row in rows)
    fastest = max(row["flops_per_second"] for row in rows)
    assert rows[-1]["flops_per_second"] / rows[-1]["mfu"] == pytest.approx(max(best, fastest))


@pytest.mark.parametrize(
    ("minutes", "steps", "warmup", "said"),
    [
        (1.0, 24, 3, "this machine trains 100 tokens/s: 24 steps (all 24), about 0.4 minutes"),
        (0.256, 16, 2, "this machine trains 100 tokens/s: 16 steps (instead of 24), about 0.3 minutes"),
        (0.02, 1, 0, "this machine trains 100 tokens/s: 1 steps (instead of 24), about 0.0 minutes"),
    ],
)
def test_as_many_steps_as_fit(
    minutes: float, steps: int, warmup: int, said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "tokens_per_second", lambda run, part: 100.0)
    run, line = pace.fit_steps(config(place), minutes)
    assert (run.train.steps, run.schedule.warmup_steps, line) == (steps, warmup, said)
    assert run.data == config(place).data and run.model == config(place).model
    with pytest.raises(ConfigError, match=r"100 tokens/s, so no step of 96 tokens fits into 0\.01 minutes"):
        pace.fit_steps(config(place), 0.01)


def test_the_pace_counts_evaluations(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second; eight sequences are evaluated for each 32 trained on, at a third of the cost."""
    now = [0.0]
    step = Trainer.step

    def counted(self: Trainer, batch: Batch, number: int) -> object:
        now[0] += 1.0
        return step(self, batch, number)

    monkeypatch.setattr(Trainer, "step", counted)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    assert pace.tokens_per_second(config(place), Part()) == pytest.approx(4 * 24 / (1 + 8 / 32 / 3))


def test_a_run_that_was_fitted_is_the_shorter_run(
    place: Path, go: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--minutes` times steps before the run and leaves no trace in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        pace, "tokens_per_second", lambda run, part: (Trainer(run).step(pace.random_batch(run), 0), 100.0)[1]
    )
    command = ["train", str(place / "run.toml"), f"data.path={place / 'shards'}", "--minutes", "0.128"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "8 steps (instead of 24)" in done.stderr
    go("train.steps=8", "schedule.warmup_steps=1", runs=tmp_path / "plain")
    assert history(tmp_path / "runs" / "run") == history(tmp_path / "plain" / "run")
    again = CliRunner().invoke(app, [*command, "--resume"])
    assert again.exit_code and "leave it out with --resume" in str(again.exception)


# ---- two at once ----


def test_two_runs_in_one_folder_are_refused_until_the_first_has_ended(place: Path, tmp_path: Path) -> None:
    """Refused before anything is written, and let in once the holder was killed -9."""
    run = tmp_path / "runs/run"
    first = start(place, tmp_path, "train.steps=4000", "checkpoint.every=4000")
    wait_for(first, lambda: rows(run, 8))
    for resume, changes in ((False, ()), (True, ()), (False, ("train.steps=5000",))):
        with pytest.raises(ConfigError, match="is being trained by another process; wait, or choose another --name"):
            train(config(place, *changes), resume=resume, runs=tmp_path / "runs")
    assert first.is_alive()
    end(first, signal.SIGKILL)
    assert train(config(place), resume=True, runs=tmp_path / "runs").step == 24
    found = [row["step"] for row in history(run) if "loss" in row]
    assert found == list(range(1, 25))


def test_a_run_that_comes_to_nothing_leaves_no_folder(go: Callable[..., Summary], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished shards"):
        go(f"data.path={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="holds no run to resume"):
        go("name=typo", resume=True)
    assert not (tmp_path / "run").exists() and not (tmp_path / "typo").exists()


def test_a_place_that_cannot_be_written_is_one_line(go: Callable[..., Summary], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/run cannot be written: Not a directory"):
        go(runs=tmp_path / "file")


# ---- other settings on resuming ----


def windows_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the windows that are trained on from now on."""
    seen: list[int] = []
    batch = TokenDataset.batch

    def noted(self: TokenDataset, first: int, n: int):  # type: ignore[no-untyped-def]
        seen.extend(range(first, first + n))
        return batch(self, first, n)

    monkeypatch.setattr(TokenDataset, "batch", noted)
    return seen


@pytest.mark.parametrize(
    "changed",
    [
        ("train.batch_size=6",),
        ("train.batch_size_start=0",),
        ("train.ramp=0.9",),
        ("train.steps=16",),
        ("train.steps=11",),
        ("train.batch_size=5", "train.steps=20", "optimizer.lr=1e-3"),
    ],
)
def test_no_window_is_skipped_or_seen_twice(
    go: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: tuple[str, ...]
) -> None:
    seen = windows_seen(monkeypatch)
    go("train.steps=10")
    before = read_rows(tmp_path / "run/metrics.jsonl")
    done = go("train.steps=10", *changed, resume=True)
    assert seen == list(range(len(seen)))
    found = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert done.tokens == found[-1]["tokens"] == sum(row["batch_size"] for row in found) * 24 == len(seen) * 24
    assert len(before) < len(read_rows(tmp_path / "run/metrics.jsonl"))


def test_other_settings_are_said_aloud_with_what_they_do(go: Callable[..., Summary], tmp_path: Path) -> None:
    go("train.steps=10")
    go("train.steps=40", "optimizer.weight_decay=0.2", resume=True)
    lines = [row["message"] for row in read_rows(tmp_path / "run/metrics.jsonl") if row.get("event") == "changed"]
    assert lines[0] == "resumed with other settings: train.steps 10 -> 40, optimizer.weight_decay 0.1 -> 0.2"
    assert lines[1].startswith("step 11 by the old and the new settings (schedules are shares of train.steps): ")
    assert "learning rate 0.000387 -> 0.003" in lines[1]
    assert len(lines) == 2


def test_the_same_settings_are_not(whole: Path, finished: Path, go: Callable[..., Summary]) -> None:
    shutil.rmtree(finished / "checkpoints/step-24")
    go(resume=True)
    assert "changed" not in events(finished)
    assert history(finished) == history(whole)


@pytest.mark.parametrize("length", [12, 48, 20])
def test_windows_of_another_length_begin_where_the_old_ones_end(
    go: Callable[..., Summary], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Less than a window is passed over where the lengths do not fit, and the line says how much."""
    seen = windows_seen(monkeypatch)
    go("train.steps=10")
    behind = len(seen) * 24
    go("train.steps=12", f"data.seq_len={length}", resume=True)
    first = seen[behind // 24] * length
    assert 0 <= first - behind < length
    (line,) = [m for m in messages(tmp_path / "run") if m.startswith("windows of")]
    assert f"go on {first - behind} tokens after" in line


def messages(run: Path) -> list[str]:
    return [row["message"] for row in read_rows(run / "metrics.jsonl") if row.get("event") == "changed"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("train.seed=1", "train.seed = 1, but the run continues with 0"),
        ("data.fim_rate=0.0", r"data.fim_rate = 0.0, but the run continues with 0.3"),
        ("train.steps=20", "train.steps = 20, but .* has done 24 steps already"),
    ],
)
def test_what_cannot_be_kept_is_refused(finished: Path, go: Callable[..., Summary], change: str, word: str) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=word):
        go(change, resume=True)
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_shards_of_another_tokenizer_are_refused_and_other_text_is_said_aloud(
    finished: Path, place: Path, tmp_path: Path, go: Callable[..., Summary]
) -> None:
    text = tmp_path / "other.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"one two three four {i} " * 40}) for i in range(80)))
    prepare([text], tmp_path / "other", train_vocab=280, validation_fraction=0.2, workers=1)
    with pytest.raises(ValueError, match="has another tokenizer than"):
        go(f"data.path={tmp_path / 'other'}", resume=True)
    same = place / "shards/tokenizer.json"
    rows_ = [json.dumps({"text": " ".join(["war", "and", "peace"] * 30)}) for _ in range(90)]
    (tmp_path / "more.jsonl").write_text("\n".join(rows_))
    prepare([tmp_path / "more.jsonl"], tmp_path / "more", tokenizer=same, validation_fraction=0.5, workers=1)
    go(f"data.path={tmp_path / 'more'}", "train.steps=25", resume=True)
    assert any("the run continues at window" in line for line in messages(finished))


# ---- a state of another shape ----


def stored(state: dict[str, torch.Tensor], folder: Path) -> dict[str, Spread]:
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "state.safetensors")
    return open_state(folder)


def spoil(state: dict[str, torch.Tensor], how: str) -> str:
    """Spoil one tensor of a state; returns its name."""
    name = {"step": "step.norm.weight", "ema": "ema.layers.0.mlp.up_proj.weight"}.get(how, "exp_avg.norm.weight")
    change = {
        "[1]": lambda t: torch.zeros(1),
        "[0]": lambda t: torch.zeros(0),
        "[]": lambda t: torch.zeros(()),
        "transposed": lambda t: t[None],
        "int64": lambda t: t.long(),
        "step": lambda t: torch.zeros(3),
        "ema": lambda t: t[:1],
    }.get(how)
    if change is None:
        del state[name]
    else:
        state[name] = change(state[name])
    return name


@pytest.mark.parametrize("how", ["[1]", "[0]", "[]", "transposed", "int64", "step", "ema", "missing"])
def test_a_state_that_does_not_fit_is_named_before_anything_is_written(place: Path, how: str, tmp_path: Path) -> None:
    run = config(place)
    trainer = Trainer(run)
    trainer.step(Batch(torch.zeros(4, 26, dtype=torch.long), 4), 0)
    state = {name: t.clone() for name, t in trainer.state_tensors().items()}
    Trainer(run).load_state_tensors(stored(state, tmp_path), [])
    name = spoil(state, how)
    with pytest.raises(ValueError, match=rf"the checkpoint's {name} (has shape|is int64|is missing)"):
        Trainer(run).load_state_tensors(stored(state, tmp_path), [])


def test_missing_and_foreign_tensors_are_named(place: Path, tmp_path: Path) -> None:
    run = config(place)
    trainer = Trainer(run)
    trainer.step(Batch(torch.zeros(4, 26, dtype=torch.long), 4), 0)
    state = trainer.state_tensors()

    def loaded(state: dict[str, torch.Tensor], without: list[str]) -> None:
        Trainer(run).load_state_tensors(stored(state, tmp_path), without)

    with pytest.raises(ValueError, match=r"exp_avg.layers.9.x belongs to no parameter \(and 1 more\)"):
        loaded(state | {"exp_avg.layers.9.x": torch.zeros(1), "z": torch.zeros(1)}, [])
    none = {name: t for name, t in state.items() if not name.endswith(".norm.weight")}
    with pytest.raises(ValueError, match=r"step\..*norm.weight is missing"):
        loaded(none, [])
    with pytest.raises(ValueError, match=r"step.norm.weight is nan, not a number of steps"):
        loaded(state | {"step.norm.weight": torch.tensor(float("nan"))}, [])
    loaded({}, [name for name, _ in trainer.model.named_parameters()])
