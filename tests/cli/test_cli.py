"""The command line: what others rely on in its output, and how it speaks of bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from leanseek import InputError, ModelConfig, Transformer, native, save
from leanseek.cli import app, doctor, main
from leanseek.machine import probes
from leanseek.native import library

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip


def leanseek(*arguments: str, **environment: str) -> str:
    """What the command prints, in a process of its own."""
    run = [sys.executable, "-m", "leanseek", *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """How a command that fails in this process ends: its exit code, and standard error."""
    monkeypatch.setattr(sys, "argv", ["leanseek", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


def test_info_prints_one_json_object() -> None:
    figures = json.loads(leanseek("info", "v3-671b", "--json"))
    assert {"parameters", "activated_parameters", "kv_bytes_per_token", "train_flops_per_token"} <= set(figures)
    assert figures["kv_bytes_per_token"] == 70_272


def test_doctor_names_a_path_for_every_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probes, "gemm_rate", lambda *_: 1e9)
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["training_dtype"] in ("float32", "bfloat16")
    assert {"linear", "expert_products", "latent_attention"} <= {path["op"] for path in found["ops"]}
    monkeypatch.setattr(doctor, "examine", lambda: found)
    doctor.doctor()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[6:])) <= 100  # the table of ops fits a terminal
    assert found["kernels"]["detail"] and found["cpus"] >= 1
    assert f"idle threads: {found['waiting']}" in text
    assert re.match(r"\d+, (nothing to interleave|weights (not )?interleaved)", found["memory_nodes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "no-such-model"), "no preset 'no-such-model'; there are"),
        (("plan", "no-such-model"), "no preset 'no-such-model'; there are"),
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
def test_bad_input_is_one_line_and_exit_2(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = ended(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_the_instruction_set_can_be_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cleared: Callable[[], None]
) -> None:
    if native.usable_variants():
        plainest = native.usable_variants()[-1]
        monkeypatch.setenv("LEANSEEK_CPU", plainest)
        cleared()
        assert native.status().variant == plainest
    monkeypatch.setenv("LEANSEEK_CPU", "sse2")
    cleared()
    code, said = ended(monkeypatch, capsys, "doctor")
    assert code == 2
    assert said.startswith("leanseek: LEANSEEK_CPU=sse2 names no kernels for this CPU; choose ")
    assert said.count("\n") == 1


@pytest.fixture
def cleared() -> Iterator[Callable[[], None]]:
    """Forgets which kernels there are: at each call, and at the end."""
    yield library._usable.cache_clear
    library._usable.cache_clear()


def test_without_kernels_no_op_runs_on_them() -> None:
    """In a process of its own: which kernels there are is found out when they are imported."""
    found = json.loads(leanseek("doctor", "--json", LEANSEEK_CPU="none"))
    assert found["kernels"] == {"variant": None, "detail": "left out: LEANSEEK_CPU=none"}
    assert {backend for path in found["ops"] for backend in path["rows"].values()} <= {"torch", "gpu"}


def test_report_survives_what_a_run_may_leave_behind(tmp_path: Path) -> None:
    """No validation yet, no experts, a last line cut off by a kill."""
    from leanseek.training import RunConfig
    from leanseek.training.report import write_report

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


@pytest.mark.parametrize("format", ["hf", "hf-fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_doctor_names_the_weights_that_are_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, value: float
) -> None:
    config = ModelConfig(**SMALL)
    model = Transformer(config).init_weights(0)
    save(model, tmp_path / "good", format)
    app(["doctor", str(tmp_path / "good")], standalone_mode=False)
    assert capsys.readouterr().out.strip().endswith("tensors, all of them finite")
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight[0, 0] = value
    model.norm.weight.data[:2] = value
    with pytest.warns(UserWarning, match="weights hold NaN"):
        save(model, tmp_path / "bad", format, allow_nonfinite=True)
    with pytest.raises(InputError, match=r"bad: 2 of \d+ tensors hold NaN or infinity"):
        app(["doctor", str(tmp_path / "bad"), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)["nonfinite"]
    assert found.pop("model.norm.weight") == 2
    ((name, count),) = found.items()  # of FP8, the block's scale or its codes
    assert name.startswith("model.layers.0.self_attn.o_proj.weight") and count >= 1


@pytest.mark.parametrize("command", ["data prepare", "serve", "chat", "generate"])
def test_help_shows_what_an_option_is_when_left_away(command: str) -> None:
    """rich takes a word in brackets for a style, and swallows it."""
    done = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"})
    assert "(default: " in done.output


def test_a_fetched_corpus_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters of a name are spelled; the lines of the answer stay lines."""
    from leanseek.data import corpora

    monkeypatch.setattr(corpora, "fetch", lambda name, out: "   1 MB  a\x1b[0m\n   1 MB of text")
    said = CliRunner().invoke(app, ["data", "fetch", "shakespeare", "--out", "x"]).stdout
    assert said == "   1 MB  a\\x1b[0m\n   1 MB of text\n"
