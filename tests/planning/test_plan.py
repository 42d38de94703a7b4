"""leanseek plan: what it offers fits, what does not is refused in a line, and published figures come out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from leanseek import ModelConfig, planning
from leanseek.cli import app
from leanseek.cli.plan import count_tokens, read_settings
from leanseek.config import ConfigError
from leanseek.planning.hardware import GPUS, find_gpu
from leanseek.planning.layout import Layout, Recipe
from leanseek.planning.published import baselines, is_v3, table_1
from leanseek.planning.search import Plan, as_settings, best_by_layout, layouts, search
from leanseek.training.config import RunConfig

V3 = ModelConfig.preset("v3-671b")


@pytest.fixture(scope="module")
def v3_plans() -> list[Plan]:
    return search(V3, 2048, GPUS["h800"], Recipe())


# ---- the search ----


def test_what_is_offered_fits_and_divides(v3_plans: list[Plan]) -> None:
    for plan in v3_plans:
        layout = plan.layout
        assert sum(plan.memory.values()) <= GPUS["h800"].memory
        assert layout.gpus == 2048 and layout.dp % layout.ep == 0 and 256 % layout.ep == 0
        assert layout.micro_batches(Recipe()) * layout.dp * layout.micro_batch_size == 15360
        assert not (layout.fsdp and layout.pp > 1)
    speeds = [plan.tokens_per_second_per_gpu for plan in v3_plans]
    assert speeds == sorted(speeds, reverse=True)


def test_the_papers_layout_is_within_two_per_cent_of_the_best(v3_plans: list[Plan]) -> None:
    best = v3_plans[0]
    assert (best.layout.pp, best.layout.schedule, best.layout.precision) == (16, "dualpipev", "fp8")
    (papers,) = (
        p
        for p in best_by_layout(v3_plans, 99)
        if (p.layout.pp, p.layout.ep) == (16, 64) and p.layout.schedule == "dualpipev" and p.layout.precision == "fp8"
    )
    assert papers.tokens_per_second_per_gpu > 0.98 * best.tokens_per_second_per_gpu


def test_hours_are_tokens_over_speed(v3_plans: list[Plan]) -> None:
    best = v3_plans[0]
    assert best.gpu_hours(14.8e12) * 3600 * best.tokens_per_second_per_gpu == pytest.approx(14.8e12)
    flops = planning.train_flops_per_token(V3, 4096) * best.tokens_per_second_per_gpu
    assert best.mfu == pytest.approx(flops / 989e12)


def test_given_parts_of_a_layout_stay() -> None:
    fixed = {"pp": 8, "ep": 64, "schedule": "zb1p", "precision": "fp8"}
    for plan in search(V3, 1024, GPUS["h200"], Recipe(batch_size=8192), fixed):
        assert fixed == {name: getattr(plan.layout, name) for name in fixed}
    small = {"schedule": "dualpipev", "micro_batch_size": 3}  # one GPU has no pipeline, whatever its schedule
    (plan, *_) = search(ModelConfig.preset("demo"), 1, GPUS["h100"], Recipe(seq_len=256), small)
    assert (plan.layout.pp, plan.layout.micro_batch_size, plan.step.bubble) == (1, 3, 0)


def test_a_gpu_without_fp8_is_offered_none() -> None:
    found = list(layouts(V3, 64, GPUS["a100"], Recipe(), {}))
    assert found and {layout.precision for layout in found} == {"bf16"}


def test_one_gpu_and_a_dense_network() -> None:
    dense = ModelConfig.from_dict(
        {
            "num_hidden_layers": 4,
            "n_routed_experts": 0,
            "num_nextn_predict_layers": 0,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "vocab_size": 4096,
        }
    )
    best = search(dense, 1, GPUS["h100"], Recipe())[0]
    assert (best.layout.pp, best.layout.dp, best.layout.ep, best.layout.zero, best.layout.fsdp) == (
        1,
        1,
        1,
        False,
        False,
    )
    assert best.step.exchange == best.step.gradients == best.step.bubble == 0


def test_too_few_gpus_are_told_by_how_much_and_what_would_do() -> None:
    config, recipe = ModelConfig.preset("moonlight-16b"), Recipe(batch_size=64)
    with pytest.raises(ConfigError) as refused:
        search(config, 2, GPUS["h800"], recipe)
    line = str(refused.value)
    assert "no layout fits 2 x h800: the leanest (pp" in line and "GiB more than there are" in line
    offers = line.rsplit("it would fit ", 1)[1].split(" or ")
    assert offers[0].endswith("h800") and len(offers) == 3
    for offer in offers:  # and it is true
        number, name = offer.split(" x ")
        assert search(config, int(number), GPUS[name], recipe)
        with pytest.raises(ConfigError):
            search(config, int(number) // 2, GPUS[name], recipe)


def test_a_network_that_nothing_holds() -> None:
    huge = dataclasses.replace(V3, hidden_size=2**20, num_hidden_layers=61)
    with pytest.raises(ConfigError, match=r"no layout fits 8 x b200: .*; nor do up to 65,536 GPUs hold it"):
        search(huge, 8, GPUS["b200"], Recipe(), {"pp": 8, "ep": 1})


@pytest.mark.parametrize(
    "fixed",
    [{"pp": 3}, {"ep": 3}, {"pp": 2, "fsdp": True}, {"pp": 64}, {"micro_batch_size": 7}, {"zero": True, "fsdp": True}],
)
def test_a_layout_that_does_not_divide(fixed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no layout divides 2,048 GPUs with ") as refused:
        search(V3, 2048, GPUS["h800"], Recipe(), fixed)
    assert all(f"{name} = {str(value).lower()}" in str(refused.value) for name, value in fixed.items())


def test_the_layout_is_given_in_the_words_of_a_run() -> None:
    """Each setting is a key of the run's TOML."""
    layout = Layout(pp=2, dp=64, ep=32, zero=True, schedule="zb1p", precision="fp8", micro_batch_size=4)
    settings = as_settings(layout, node=8)
    run = RunConfig.load("v3-671b", settings)
    assert (run.parallel.pp, run.parallel.ep, run.parallel.zero, run.parallel.fsdp) == (2, 32, True, False)
    assert (run.parallel.schedule, run.parallel.ranks_per_node) == ("zb1p", 8)
    assert (run.train.precision, run.train.micro_batch_size, run.train.recompute) == ("fp8", 4, False)
    assert read_settings(settings)["schedule"] == "zb1p"


# ---- published figures ----


def test_table_1() -> None:
    table = table_1()
    assert table.hours == {
        "pre-training": 2_664_000, "context extension": 119_000, "post-training": 5_000, "total": 2_788_000,
    }  # fmt: skip
    assert table.dollars == 5_576_000


def test_baselines_have_their_published_sizes() -> None:
    found = baselines()
    dense, llama, mixtral = found["dense 671B"], found["LLaMA-405B"], found["Mixtral-8x22B"]
    assert planning.parameters(dense) == pytest.approx(671.03e9, rel=1e-4)
    assert planning.activated_parameters(dense) == planning.parameters(dense)
    assert planning.parameters(llama) == pytest.approx(405.9e9, rel=1e-3)
    assert planning.train_flops_per_token(llama, 4096) == pytest.approx(2448e9, rel=0.02)  # Insights, table 2
    assert planning.kv_bytes_per_token(llama) == 516_096  # Insights, table 1
    assert planning.parameters(mixtral) == pytest.approx(140.6e9, rel=1e-3)
    assert planning.activated_parameters(mixtral) == pytest.approx(39.2e9, rel=2e-3)
    assert is_v3(V3) and not any(map(is_v3, found.values()))


def test_gpus_are_complete() -> None:
    for gpu in GPUS.values():
        assert gpu.bf16 < gpu.fp8 or not gpu.fp8
        assert gpu.network < gpu.nvlink < gpu.bandwidth and gpu.price > 0
    assert find_gpu("H800") is GPUS["h800"]
    with pytest.raises(ConfigError, match="no GPU 'rtx' in the table; there are a100, h800, h100, h200, b200"):
        find_gpu("rtx")


# ---- the command ----


def plan(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["plan", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_the_command_answers_in_json() -> None:
    found = plan("v3-671b", "--gpus", "2048", "--gpu", "h800", "--tokens", "14.8T")
    assert found["cost_dollars"] == pytest.approx(2 * found["gpu_hours"])
    assert found["gpu_hours"] == pytest.approx(2_664_000, rel=0.15)  # of the paper's pre-training
    assert found["days"] * 24 * 2048 == pytest.approx(found["gpu_hours"])
    assert sum(found["memory_per_gpu_bytes"].values()) == found["memory_total_bytes"] <= found["memory_limit_bytes"]
    assert {"weights", "gradients", "moments", "activations", "exchange_buffers", "logits", "ema"} <= set(
        found["memory_per_gpu_bytes"]
    )
    kept = found["activation_bytes"]
    assert kept["fp8, recomputed"] < kept["fp8"] < kept["bf16, recomputed"] < kept["bf16"]
    assert 0 < found["bubble_fraction"] < 0.1 and 0 < found["exchange_hidden_fraction"] <= 1
    assert found["layout"]["pp"] * found["layout"]["dp"] == 2048 and found["layout"]["cp"] == 1
    step = found["step_seconds"]
    assert step["total"] == pytest.approx(sum(step.values()) - step["total"] - step["exchange"])
    assert found["published"]["table_1_cost_dollars"] == 5_576_000
    own, dense, llama, mixtral = found["compared"]
    assert own["gpu_hours"] == pytest.approx(found["gpu_hours"])
    assert dense["gpu_hours"] > llama["gpu_hours"] > 8 * own["gpu_hours"] > 8 * mixtral["gpu_hours"] * 0.9


def test_settings_and_price() -> None:
    found = plan("moonlight-16b", "--gpus", "64", "--gpu", "h100", "--tokens", "5.7T", "--price", "2", "parallel.pp=1",
                 "parallel.fsdp=true", "train.batch_size=2048", "data.seq_len=8192", "optimizer.ema=0")  # fmt: skip
    assert found["layout"]["fsdp"] and found["price_per_gpu_hour"] == 2 and "published" not in found
    assert (found["seq_len"], found["batch_size"], found["memory_per_gpu_bytes"]["ema"]) == (8192, 2048, 0)


def test_a_hugging_face_folder_is_a_model(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "checkpoint/configs/deepseek-v3.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    found = plan(str(tmp_path), "--gpus", "512", "--gpu", "h200", "--tokens", "1T")
    assert found["parameters"] == planning.parameters(V3) and "published" in found


def test_the_tables_say_the_same() -> None:
    done = CliRunner().invoke(app, ["plan", "v3-671b"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    for text in (
        "2,788 K",
        "$5.576 M",
        "dualpipev",
        "tokens per second per GPU",
        "Mixtral-8x22B",
        "leanseek train CONFIG parallel.pp=",
    ):
        assert text in done.output


def test_the_timeline_is_drawn(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["plan", "moonlight-16b", "--gpus", "8", "parallel.pp=4", "--schedule", str(tmp_path / "x.svg")]
    )
    assert done.exit_code == 0 and "<svg" in (tmp_path / "x.svg").read_text(encoding="utf-8")[:600]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--gpu", "rtx"), "no GPU 'rtx' in the table; there are a100"),
        (("--gpus", "0"), "--gpus 0 is not a number of GPUs"),
        (("--gpus", "8"), "no layout fits 8 x h800"),
        (("--tokens", "many"), "--tokens 'many' is not a number of tokens"),
        (("--price", "-1"), "--price -1.0 is not a price"),
        (("parallel.pp=0",), "parallel.pp = 0 is not a whole number of at least 1"),
        (("parallel.schedule=gpipe",), "parallel.schedule = 'gpipe' is not one of 1f1b, zb1p, dualpipev"),
        (("train.precision=fp8-tensorwise",), "train.precision = 'fp8-tensorwise' is not one of bf16, fp8"),
        (("optimizer.lr=1",), "'optimizer.lr=1' is not a setting of a plan; there are parallel.pp"),
        (("data.seq_len=8192",), "data.seq_len = 8192 is beyond model.max_position_embeddings = 4096"),
        (("--gpu", "b200", "--schedule", "x.gif"), "ends in .svg or .png"),
        (("parallel.pp=1", "--gpu", "b200", "--gpus", "1024", "--schedule", "x.svg"), "--schedule draws a pipeline"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    done = CliRunner().invoke(app, ["plan", "v3-671b", *arguments])
    assert isinstance(done.exception, ConfigError), done.output  # main() prints it and exits with 2
    assert line in str(done.exception) and "\n" not in str(done.exception)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("14.8T", 14.8e12),
        ("500b", 5e11),
        ("1e12", 1e12),
        ("300,000,000", 3e8),
        (" 7M ", 7e6),
        ("10_000", 1e4),
        ("2K", 2e3),
    ],
)
def test_tokens_have_suffixes(text: str, number: float) -> None:
    assert count_tokens(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "T", "-1T", "1TB", "0", "1e99", "nan", "1.2.3T", "１T" * 500])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a number of tokens"):
        count_tokens(text)
