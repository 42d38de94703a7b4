"""`leanseek train … --nproc N`: one command, one line when something is wrong, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leanseek.checkpoint.training import newest_whole
from leanseek.config import ConfigError
from leanseek.distributed import check_layout
from leanseek.training import RunConfig, train
from leanseek.training.metrics import read_rows
from leanseek.training.report import write_report
from tests.small import run_toml

CONFIG = run_toml(
    {"num_hidden_layers": 4, "n_routed_experts": 8},
    data={"seq_len": 24},
    train={"steps": 6, "batch_size": 4, "micro_batch_size": 1, "eval_every": 3, "eval_sequences": 4},
    schedule={"warmup_steps": 2},
    checkpoint={"every": 3},
)
LONG = ["train.steps=100000", "train.eval_every=100000", "checkpoint.every=100000"]
PROGRAM = (  # a rank that hangs is named after {} seconds
    "import sys, leanseek.distributed; sys.modules['leanseek.distributed.launch'].PATIENCE = {}; "
    "from leanseek.cli import main; main()"
)
LIMIT = 600  # seconds after which a command counts as one that hangs, on a machine that does much else


@pytest.fixture(scope="module")
def place(run_folder: Callable[[str], Path]) -> Path:
    """A folder with shards and a configuration, run.toml."""
    return run_folder(CONFIG)


class Command:
    """`leanseek train run.toml …` in a session of its own, as a terminal starts it."""

    def __init__(self, place: Path, folder: Path, nproc: int, *settings: str, patience: float = LIMIT):
        program = PROGRAM.format(patience)
        command = [sys.executable, "-c", program, "train", str(place / "run.toml"), f"data.path={place / 'shards'}"]
        self.process = subprocess.Popen(
            [*command, *(["--nproc", str(nproc)] if nproc > 1 else []), *settings],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.metrics = folder / "runs/run/metrics.jsonl"

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                rank = re.search(r"\0RANK=(\d+)", (folder / "environ").read_text())
                if parent == self.process.pid and rank:  # not before its own program runs
                    found[int(rank[1])] = int(folder.name)
            except OSError:  # it has ended
                continue
        return found

    def trained(self, rows: int) -> None:
        """Wait until that many rows are written."""
        end = time.monotonic() + LIMIT
        while not self.metrics.exists() or self.metrics.read_text().count('"loss"') < rows:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "no training"
            time.sleep(0.1)

    def end(self) -> tuple[int, str, str]:
        """Exit code, output, and what was said on stderr besides the progress bar's line."""
        out, said = self.process.communicate(timeout=LIMIT)
        lines = [line for line in said.splitlines() if line.startswith("leanseek: ") or "Traceback" in line]
        assert not re.search(r"Traceback|torch|\[W|\[E|^W\d|^E\d", said), said
        return self.process.returncode, out, "\n".join(lines)


@pytest.fixture
def command(place: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """command(nproc, *settings): starts one; what is left of them at the end is killed."""
    started: list[Command] = []

    def start(nproc: int, *settings: str, **options: float) -> Command:
        started.append(Command(place, tmp_path, nproc, *settings, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.communicate()


def gone(pids: dict[int, int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGSTOP, "stopped, or is gone with its process or machine; last seen .*"),
        (signal.SIGKILL, "ended after .*: SIGKILL"),
    ],
)
def test_a_rank_that_is_lost_is_named_in_one_line(
    command: Callable[..., Command], number: int, says: str, victim: int
) -> None:
    """And all the others stop, with exit code 1."""
    run = command(3, "parallel.zero=true", *LONG, patience=10.0)
    run.trained(2)
    pids = run.ranks()
    os.kill(pids[victim], number)
    code, _, said = run.end()
    others = "ranks 0, 2" if victim else "ranks 1-2"
    assert re.fullmatch(f"leanseek: rank {victim} has {says}; (.*; )?ranks? .* waits? .*", said), said
    assert (others in said) or re.search(r"ranks? \d wait", said), said
    assert code == 1
    assert gone(pids)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_is_full_for_one_rank_stops_all_in_one_line(command: Callable[..., Command], victim: int) -> None:
    """The first writes rows and a part of every checkpoint, the other its part. What was whole is whole."""
    run = command(2, "parallel.zero=true", "train.steps=100000", "train.eval_every=100000")
    run.trained(4)  # the checkpoint of step 3 is begun
    while newest_whole(run.metrics.parent) is None:  # and written beside the steps
        assert run.process.poll() is None
        time.sleep(0.01)
    pids, limit = run.ranks(), run.metrics.stat().st_size + 100
    resource.prlimit(pids[victim], resource.RLIMIT_FSIZE, (limit, limit))
    code, _, said = run.end()
    assert code == 1
    says = re.fullmatch(
        rf"leanseek: (rank {victim}: )?runs/run cannot be written: File too large: make room; "
        r"checkpoints/step-(\d+) is whole: continue with --resume",
        said,
    )
    assert says, said
    assert newest_whole(run.metrics.parent) == run.metrics.parent / f"checkpoints/step-{says[2]}"
    assert gone(pids)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_lost_before_it_works_stops_all_in_one_line(
    command: Callable[..., Command], victim: int
) -> None:
    """While it imports, when nobody has heard of it."""
    run, pids = command(2, *LONG), dict[int, int]()
    while len(pids) < 2:
        assert run.process.poll() is None
        time.sleep(0.05)
        pids = run.ranks()
    os.kill(pids[victim], signal.SIGKILL)
    code, _, said = run.end()
    assert said == f"leanseek: rank {victim} was ended by SIGKILL"
    assert code == 1
    assert gone(pids) and not (run.metrics.parent / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("group", signal.SIGINT),  # Ctrl-C in a terminal
        ("group", signal.SIGTERM),  # a supervisor's stop
        ("launcher", signal.SIGTERM),
        ("rank 1", signal.SIGINT),
    ],
)
def test_a_signal_saves_the_run_and_stops_all(command: Callable[..., Command], whom: str, number: int) -> None:
    run = command(2, "parallel.ep=2", *LONG)
    run.trained(1)
    pids = run.ranks()
    if whom == "group":
        os.killpg(run.process.pid, number)
    else:
        os.kill(run.process.pid if whom == "launcher" else pids[1], number)
    code, _, said = run.end()
    assert code == 130
    stopped = re.fullmatch(r"leanseek: stopped at step (\d+); continue with --resume", said)
    assert stopped, said
    assert (run.metrics.parent / f"checkpoints/step-{stopped[1]}/state.json").is_file()
    assert gone(pids)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_without_their_launcher_save_the_run_and_stop(command: Callable[..., Command]) -> None:
    run = command(2, *LONG)
    run.trained(1)
    pids = run.ranks()
    run.process.kill()
    end = time.monotonic() + LIMIT
    while not gone(pids):
        assert time.monotonic() < end, "ranks went on without the launcher"
        time.sleep(0.2)
    assert len(list(run.metrics.parent.glob("checkpoints/step-*/state.json"))) == 1


@pytest.mark.distributed
def test_a_run_of_one_process_is_resumed_on_two_ranks_with_the_same_report(
    command: Callable[..., Command], place: Path, tmp_path: Path, quick_runs: None
) -> None:
    """--json, --resume and --compare; the time of each rank is in the rows and in the report."""
    three = RunConfig.load(str(place / "run.toml"), [f"data.path={place / 'shards'}", "train.steps=3"])
    assert train(three, runs=tmp_path / "runs").step == 3
    again = command(2, "parallel.ep=2", "parallel.zero=true", "--resume", "--json", "--compare", "runs/run")
    code, out, said = again.end()
    assert (code, said) == (0, "")
    assert json.loads(out)["step"] == 6
    rows = read_rows(again.metrics)
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        if "loss" in row and row["step"] > 3:
            kinds = row["ranks"]
            assert list(kinds) == ["compute_s", "exchange_s", "wait_s"]
            assert all(len(times) == 2 and min(times) > 0 for times in kinds.values()), row
            whole = 4 * 24 / row["tokens_per_second"]
            assert sum(times[0] for times in kinds.values()) == pytest.approx(whole, abs=1e-3)
    words = [r["message"] for r in rows if r.get("event") in ("started", "resumed")]
    assert "2 processes of 1 thread: pp 1 × dp 2, ep 2, ZeRO-1;" in words[1]
    assert "Time of each rank: rank " in (again.metrics.parent / "report.html").read_text()


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "leanseek", "train"]


@pytest.mark.slow
@pytest.mark.distributed
def test_ctrl_c_of_torchrun_saves_the_run(place: Path, tmp_path: Path) -> None:
    """It hands the signal on once. The exit code is its own."""
    command = [sys.executable, *TORCHRUN, str(place / "run.toml"), f"data.path={place / 'shards'}", *LONG]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **quiet)
    run, end = tmp_path / "runs/run", time.monotonic() + LIMIT
    try:
        while not (run / "metrics.jsonl").exists() or '"loss"' not in (run / "metrics.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=LIMIT) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert newest_whole(run) == run / f"checkpoints/step-{read_rows(run / 'metrics.jsonl')[-1]['step']}"


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_makes_the_same_files(place: Path, tmp_path: Path) -> None:
    settings = [str(place / "run.toml"), f"data.path={place / 'shards'}", "parallel.pp=2", "parallel.schedule=1f1b"]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/run"
    assert {p.name for p in run.iterdir()} >= {"config.toml", "metrics.jsonl", "report.html", "checkpoints"}
    assert [r["step"] for r in read_rows(run / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4, 5, 6]
    # an error of all ranks is one line, besides torchrun's own
    again = subprocess.run(
        [sys.executable, *TORCHRUN, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
    )
    assert [line for line in again.stderr.splitlines() if line.startswith("leanseek: ")] == [
        "leanseek: runs/run exists; continue it with --resume, or choose another --name"
    ]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        (["--resume"], 2, "leanseek: runs/run holds no run to resume; leave --resume away to start it"),
        (["--compare", "nowhere"], 2, "leanseek: nowhere is not the folder of a run: it has no metrics.jsonl"),
        (["data.path=nowhere"], 2, "leanseek: nowhere"),
        (["--minutes", "1e-9"], 2, "leanseek: this machine trains [0-9,]+ tokens/s, so no step"),
    ],
)
def test_an_error_of_all_ranks_is_one_line(
    command: Callable[..., Command], settings: list[str], code: int, says: str
) -> None:
    found, _, said = command(2, *settings).end()
    assert re.match(says, said), said
    assert len(said.splitlines()) == 1
    assert found == code


@pytest.mark.parametrize(
    ("ranks", "settings", "says"),
    [
        (4, ["parallel.pp=3"], "parallel.pp = 3 does not divide the 4 ranks; 1, 2 or 4 would"),
        (3, ["parallel.ep=3"], "parallel.ep = 3 does not divide the model's 8 routed experts; 1, 2, 4 or 8 would"),
        (4, ["parallel.ep=3"], "parallel.ep = 3 does not divide the 4 ranks"),
        (8, [], "train.batch_size = 4 leaves some of the 8 data-parallel ranks without a sequence"),
        (2, ["parallel.cp=2"], "parallel.cp = 2"),
        (2, ["parallel.fsdp=true", "parallel.pp=2"], "parallel.fsdp gathers a stage's weights"),
        (2, ["parallel.fsdp=true", "parallel.zero=true"], "both shard the moments"),
        (4, ["parallel.pp=4"], "dualpipev cuts the network into 8 stages"),
        (2, ["parallel.trace=true"], "parallel.trace draws the timeline of a pipeline"),
        (1, ["parallel.ep=2"], "add --nproc 2"),
    ],
)
def test_contradictions_are_refused_before_processes_start(
    place: Path, ranks: int, settings: list[str], says: str
) -> None:
    run = RunConfig.load(str(place / "run.toml"), [f"data.path={place / 'shards'}", *settings])
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        check_layout(run, ranks)
    assert "\n" not in str(caught.value)


def test_the_report_shows_who_waits_for_whom(tmp_path: Path, place: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = RunConfig.load(str(place / "run.toml"), [])
    (run / "config.toml").write_text(config.to_toml())
    row = {"step": 1, "tokens": 96, "loss": 5.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9.0, "mfu": 0.1}
    row |= {"max_violation": 0.0}
    times = {"compute_s": [0.1, 0.5, 0.2], "exchange_s": [0.3, 0.05, 0.3], "wait_s": [0.2, 0.05, 0.1]}
    (run / "metrics.jsonl").write_text(json.dumps(row | {"ranks": times}) + "\n")
    page = write_report(run).read_text()
    assert "Time of each rank: rank 1 waits least, so the others wait for it" in page
    assert "exchange of rows for experts" in page
    times["exchange_s"] = [0.0] * 3
    (run / "metrics.jsonl").write_text(json.dumps(row | {"ranks": times}) + "\n")
    page = write_report(run).read_text()
    assert "waiting for other ranks" in page and "exchange of rows for experts" not in page
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "Time of each rank" not in write_report(run).read_text()
