"""How many CPUs there are for us, and that OpenMP runs on them as we say, however the package is started."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from leanseek.data import prepare as prepare_module
from leanseek.machine import threads

TWO = "33 23 0:30 {root} {at} rw - cgroup2 cgroup2 rw"
ONE = "32 31 0:29 {root} {at} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
OTHER = "34 31 0:31 / {at}/memory rw - cgroup cgroup rw,memory"


def machine(
    at: Path, monkeypatch: pytest.MonkeyPatch, mounts: list[str], own: str, files: dict[str, str], allowed: int
) -> None:
    """A process with these control groups below `at`, on `allowed` CPUs of a core each."""
    proc = at / "proc"
    proc.mkdir()
    (proc / "mountinfo").write_text("\n".join(mounts) + "\n")
    (proc / "cgroup").write_text(own)
    for name, text in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(text)
    monkeypatch.setattr(threads, "_PROC", proc)
    monkeypatch.setattr(threads, "_CPUS", at / "nowhere")
    monkeypatch.setattr(threads, "_allowed", lambda: set(range(allowed)))


@pytest.mark.parametrize(
    ("root", "own", "files", "quota"),
    [
        ("/", "0::/\n", {"cpu.max": "100000 100000\n"}, 1.0),
        ("/", "0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("/", "0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("/", "0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("/", "0::/\n", {}, math.inf),  # the root of a host has no such file
        ("/", "0::/a/b\n", {"a/cpu.max": "150000 50000\n", "a/b/cpu.max": "max 100000\n"}, 3.0),  # one above counts
        ("/", "0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2.0),
        ("/docker/7", "0::/docker/7\n", {"cpu.max": "100000 100000\n"}, 1.0),  # the host's path, in a container
        ("/", "0::/../elsewhere\n", {"cpu.max": "100000 100000\n"}, 1.0),  # outside of the namespace
    ],
)
def test_a_quota_of_version_2(
    root: str, own: str, files: dict[str, str], quota: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "groups"
    files = {f"groups/{name}": text for name, text in files.items()}
    machine(tmp_path, monkeypatch, [TWO.format(root=root, at=at)], own, files, allowed=64)
    assert threads.quota() == quota
    assert threads.cpus() == threads.threads() == min(64, max(1, math.ceil(min(quota, 64))))


@pytest.mark.parametrize(
    ("root", "own", "files", "quota"),
    [
        ("/", "3:memory:/x\n1:cpuacct,cpu:/\n0::/\n", {"": (100000, 100000)}, 1.0),
        ("/", "1:cpu,cpuacct:/\n", {"": (-1, 100000)}, math.inf),
        ("/", "1:cpu,cpuacct:/a/b\n", {"": (-1, 100000), "a": (150000, 100000), "a/b": (-1, 100000)}, 1.5),
        ("/docker/7", "1:cpu,cpuacct:/docker/7\n", {"": (200000, 100000)}, 2.0),
        ("/", "1:cpuset:/a\n", {"": (-1, 100000), "a": (100000, 100000)}, math.inf),  # no group of the cpu's
    ],
)
def test_a_quota_of_version_1(
    root: str,
    own: str,
    files: dict[str, tuple[int, int]],
    quota: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at, texts = tmp_path / "groups", {}
    for folder, (used, period) in files.items():
        texts[f"groups/{folder}/cpu.cfs_quota_us"] = f"{used}\n"
        texts[f"groups/{folder}/cpu.cfs_period_us"] = f"{period}\n"
    mounts = [OTHER.format(at=at), ONE.format(root=root, at=at)]
    machine(tmp_path, monkeypatch, mounts, own, texts, allowed=64)
    assert threads.quota() == quota


def test_the_affinity_mask_and_the_cores_bound_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five CPUs on three cores, with a quota above and below that."""
    files = {"groups/cpu.max": "400000 100000"}
    machine(tmp_path, monkeypatch, [TWO.format(root="/", at=tmp_path / "groups")], "0::/\n", files, allowed=5)
    monkeypatch.setattr(threads, "_siblings", lambda cpu: f"{cpu % 3},{cpu % 3 + 3}")
    assert (threads.cpus(), threads.threads()) == (4, 3)
    (tmp_path / "groups/cpu.max").write_text("200000 100000")
    assert (threads.cpus(), threads.threads()) == (2, 2)
    (tmp_path / "groups/cpu.max").write_text("900000 100000")
    assert (threads.cpus(), threads.threads()) == (5, 3)


@pytest.mark.parametrize("own", [*({name: "x"} for name in threads.WAITING), {"OMP_NUM_THREADS": "7"}])
def test_what_the_user_has_set_stays(own: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "threads", lambda: 3)
    environment = dict(own)
    threads.set_openmp(environment)
    wanted = {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": threads.SPINS}
    if "OMP_NUM_THREADS" not in own:
        del wanted["GOMP_SPINCOUNT"]
    assert environment == wanted | own


@pytest.mark.parametrize(
    ("start", "own", "spins", "said"),
    [
        (["-c", "import leanseek, torch"], {}, threads.SPINS, ""),
        (["-m", "leanseek", "generate", "/nowhere", "x"], {}, threads.SPINS, ""),
        pytest.param(["-c", "import sys; from leanseek.cli import main; sys.argv[1:] = 'generate', '/nowhere', 'x'; main()"], {},
         threads.SPINS, "", marks=pytest.mark.slow),  # what -m leanseek does, in another process that imports torch
        (["-c", "from leanseek.machine.threads import waiting; import torch; print(waiting())"], {"OMP_WAIT_POLICY": "PASSIVE"},
         "0", "OMP_WAIT_POLICY=PASSIVE in the environment"),
        (["-c", "import torch; from leanseek.machine.threads import waiting; print(waiting())"], {},
         "300000", "torch was imported before leanseek"),
    ],
)  # fmt: skip
def test_openmp_runs_as_we_say(start: list[str], own: dict[str, str], spins: str, said: str) -> None:
    """libgomp itself says what it goes by, when it is loaded."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))} | own
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, *start], env=environment, capture_output=True, text=True)
    found = dict(re.findall(r"(\w+) = '(.*)'", done.stderr))
    assert found["GOMP_SPINCOUNT"] == spins
    assert said in done.stdout
    if "torch was" not in said:
        assert found["OMP_NUM_THREADS"] == str(threads.threads())


def test_data_is_prepared_on_the_cpus_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    asked = []

    def write(out: Path, source: object, settings: object, tokenizer: object, workers: int) -> None:
        asked.append(workers)
        raise StopIteration

    monkeypatch.setattr(prepare_module, "_write", write)
    monkeypatch.setattr(threads, "_allowed", lambda: {5})
    with pytest.raises(StopIteration):
        prepare_module.prepare([tmp_path / "a.txt"], tmp_path / "out", train_vocab=300)
    assert asked == [1]
