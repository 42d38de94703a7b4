"""The command line: what others rely on in its output, and how it speaks of bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from leanseek import native
from leanseek.cli import app


def leanseek(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "leanseek", *arguments]
    return subprocess.run(run, capture_output=True, text=True, env=os.environ | environment)


def test_info_prints_one_json_object() -> None:
    done = leanseek("info", "v3-671b", "--json")
    figures = json.loads(done.stdout)
    assert {"parameters", "activated_parameters", "kv_bytes_per_token", "train_flops_per_token"} <= set(figures)
    assert figures["kv_bytes_per_token"] == 70_272


def test_doctor_names_a_path_for_every_op() -> None:
    found = json.loads(leanseek("doctor", "--json").stdout)
    assert found["training_dtype"] in ("float32", "bfloat16")
    assert {"linear", "experts", "latent_attention"} <= {path["op"] for path in found["ops"]}
    text = leanseek("doctor").stdout
    assert max(map(len, text.splitlines()[6:])) <= 100  # the table of ops fits a terminal
    assert found["kernels"]["detail"] and found["cpus"] >= 1
    assert f"a thread without work: {found['waiting']}" in text
    assert re.match(r"\d+, (nothing to interleave|weights (not )?interleaved)", found["memory_nodes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "no-such-model"), "no preset 'no-such-model'; there are"),
        (("train", "no-such-run.toml"), "does not exist"),
        (("train", "demo", "train.stepz=1"), "has no key 'stepz'"),
        (("train", "demo", "data.path=/nowhere"), "holds no finished shards; run `leanseek data prepare"),
        (("data", "prepare", "/nowhere", "--out", "/tmp/x"), "give either a tokenizer file"),
        (("data", "fetch", "nothing", "--out", "/tmp/x"), "no corpus 'nothing'; there are"),
        (("generate", "/nowhere", "text"), "/nowhere does not exist"),
        (("generate", "/nowhere", "text", "--threads", "0"), "threads must lie between 1 and"),
        (("chat", "/nowhere", "--threads", "-2"), "threads must lie between 1 and"),
        (("serve", "/nowhere", "--threads", "9999"), "threads must lie between 1 and"),
        (("bench", "train", "--peers", "megatron"), "no peer 'megatron'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str) -> None:
    done = leanseek(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_the_instruction_set_can_be_named() -> None:
    if native.usable_variants():
        plainest = native.usable_variants()[-1]
        found = json.loads(leanseek("doctor", "--json", LEANSEEK_CPU=plainest).stdout)
        assert found["kernels"]["variant"] == plainest
    found = json.loads(leanseek("doctor", "--json", LEANSEEK_CPU="none").stdout)
    assert found["kernels"] == {"variant": None, "detail": "left out: LEANSEEK_CPU=none"}
    assert {backend for path in found["ops"] for backend in path["rows"].values()} <= {"torch", "gpu"}
    done = leanseek("doctor", LEANSEEK_CPU="sse2")
    assert done.returncode == 2
    assert done.stderr.startswith("leanseek: LEANSEEK_CPU=sse2 names no kernels for this CPU; choose ")
    assert done.stderr.count("\n") == 1


def test_report_survives_what_a_run_may_leave_behind(tmp_path: Path) -> None:
    """No validation yet, no experts, a last line cut off by a kill."""
    from leanseek.training import RunConfig
    from leanseek.training.report import write_picture, write_report

    (tmp_path / "config.toml").write_text(RunConfig.load("demo", []).to_toml())
    rows = [
        {"step": s, "tokens": s * 9, "loss": 5.0 / s, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9.0, "mfu": 0.1,
         "max_violation": 0.5}
        for s in range(1, 60)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 60, "lo')
    page = write_report(tmp_path).read_text()
    assert page.count("<svg") >= 4
    assert "http" not in page.split("<svg")[0]  # nothing is loaded from elsewhere
    assert write_picture(tmp_path, tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").write_text("")
    write_report(tmp_path)


def test_every_command_takes_the_same_device_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU where there is one: `load_engine` decides, and nobody before it."""
    asked: list[object] = []
    monkeypatch.setattr(
        "leanseek.engine.AsyncEngine.load", lambda model, **options: asked.append(options["device"]) or 1 / 0
    )
    done = CliRunner().invoke(app, ["serve", "/nowhere", "--port", "0"])
    assert isinstance(done.exception, ZeroDivisionError) and asked == [None]
