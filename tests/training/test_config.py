"""Settings that contradict each other are refused in one line; what is chosen for the user is said."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path

import pytest

from leanseek.config import ConfigError, ModelConfig, YarnConfig
from leanseek.training import RunConfig
from leanseek.training.config import OptimizerConfig, ScheduleConfig
from leanseek.training.schedules import batch_size, bias_update_speed, learning_rate, mtp_weight

MODEL = "[model]\nvocab_size = 300\nhidden_size = 32\nnum_hidden_layers = 1\nnum_attention_heads = 2\n"


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    (folder / "own.toml").write_text(text)
    return RunConfig.load(str(folder / "own.toml"), list(overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("schedule.warmup_steps=401", "schedule.warmup_steps = 401 ends after the decay begins"),
        ("schedule.warmup_steps=271", "is step 270; shorten the warm-up"),
        ("train.steps=30 schedule.warmup_steps=40", "schedule.warmup_steps = 40 ends after"),
        ("schedule.decay_start=0.05", "schedule.warmup_steps = 40 ends after the decay begins"),
        ("schedule.decay_start=0.97", "schedule.decay_start = 0.97 comes after decay_end = 0.966"),
        ("schedule.decay_end=0.5", "schedule.decay_start = 0.676 comes after decay_end = 0.5"),
        ("schedule.last_start=0.9", "schedule.decay_end = 0.966 comes after last_start = 0.9"),
        ("schedule.decay_end=1", "schedule.decay_end = 1.0 comes after last_start = 0.989"),
        ("schedule.final_lr=3e-3", "schedule.final_lr = 0.003 is above optimizer.lr = 0.002"),
        ("optimizer.lr=1e-5", "schedule.final_lr = 0.0001 is above optimizer.lr = 1e-05"),
        ("schedule.last_lr=2e-4", "schedule.last_lr = 0.0002 is above schedule.final_lr"),
        ("train.batch_size_start=17", "train.batch_size_start = 17 is above train.batch_size = 16"),
        ("train.batch_size_start=4 train.ramp=0", "has no effect while train.ramp = 0"),
        ("optimizer.moments=bfloat16 optimizer.betas=[0.9,0.999]", "bfloat16 moments never decay"),
        ("optimizer.moments=bfloat16 optimizer.betas=[0.997,0.95]", "bfloat16 moments never decay"),
        ("train.precision=fp8 optimizer.betas=[0.9,0.999]", "bfloat16 moments never decay"),
        ("checkpoint.keep_every=300", "checkpoint.keep_every = 300 is not a multiple of checkpoint.every = 200"),
        ("optimizer.eps=1e-50", "is 0 in float32"),
        ("optimizer.weight_decay=1000", "would flip the sign of every weight"),
        ("train.seed=9223372036854775808", "must be below 2"),
        ("data.seq_len=2049", "beyond model.max_position_embeddings"),
    ],
)
def test_a_contradiction_is_one_line(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.load("demo", overrides.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize(
    "key",
    """optimizer.lr optimizer.eps optimizer.weight_decay optimizer.clip schedule.final_lr balance.sequence_alpha
    balance.bias_update_speed mtp.weight train.spike_limit schedule.decay_start model.rope_theta model.rms_norm_eps
    model.initializer_range model.routed_scaling_factor""".split(),
)
def test_every_number_is_finite(key: str, value: str) -> None:
    place = key.replace("model.", "the model's configuration: ")
    with pytest.raises(ConfigError, match=f"{place} = {value}"):
        RunConfig.load("demo", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.betas=[0.9, nan]", "two numbers"),
        ("optimizer.betas=[true, 0.9]", "two numbers"),
        ("optimizer.lr=1" + "0" * 400, "optimizer.lr is too large"),
        ("train.steps=1" + "0" * 5000, "train.steps must be int"),
        ("optimizer.lr=" + "[" * 100_000, "optimizer.lr must be float"),
        ("train=3", "unknown table or key 'train'"),
        ("schedule=3", "unknown table or key 'schedule'"),
        ("name=..", "must be a plain folder name"),
        ("name=a/b", "must be a plain folder name"),
        ("name='a\\nb'", "must be a plain folder name"),
        ("data.path=~nobody-here/x", "there is no such home"),
        ("schedule.warmup_steps=-2", "must not be negative"),
        ("optimizer.eps=1e300", "optimizer.eps = 1e\\+300 is infinite in float32"),
        ("optimizer.clip=1e-300", "optimizer.clip = 1e-300 is 0 in float32"),
        ("balance.bias_update_speed=1e39", "is infinite in float32"),
        ("mtp.weight=1e39", "is infinite in float32"),
        ("model.rope_theta=1e-300", "model.rope_theta = 1e-300 is 0 in float32"),
        ("train.batch_size=1" + "0" * 21, "at most 1,048,576 sequences"),
        ("train.micro_batch_size=9223372036854775808", "at most 1,048,576 sequences"),
        ("train.steps=9223372036854775808", "train.steps = .* must be below 2"),
        ("checkpoint.keep_every=1" + "0" * 21, "checkpoint.keep_every = .* must be below 2"),
        ("train.device=meta", "train.device = 'meta' is not one of auto, cpu, cuda"),
        ("train.device=mps", "train.device = 'mps' is not one of auto, cpu, cuda"),
        ("train.device=''", "train.device = '' is not one of auto, cpu, cuda"),
        ("train.device=cuda:", "train.device = 'cuda:' is not one of auto, cpu, cuda"),
    ],
)
def test_values_beyond_all_bounds_are_one_line(override: str, message: str) -> None:
    if "\\n" in override:
        override = 'name="a\\nb"'
    with pytest.raises(ConfigError, match=message):
        RunConfig.load("demo", [override])


def test_what_is_no_contradiction_loads() -> None:
    for fitting in (
        ["optimizer.moments=bfloat16", "optimizer.betas=[0.9, 0.99]"],
        ["optimizer.betas=[0, 0.999]"],
        ["schedule.decay_start=0", "schedule.warmup_steps=0"],
        ["schedule.decay_start=0.5", "schedule.decay_end=0.5"],
        ["checkpoint.keep_every=400"],
        ["schedule.decay_start=0", "schedule.warmup_steps=-1"],
        ["optimizer.lr=1e-5", "schedule.final_lr=0", "schedule.last_lr=0"],
        ["name=1e3"],
    ):
        run = RunConfig.load("demo", fitting)
        assert RunConfig.from_dict(tomllib.loads(run.to_toml())) == run
    assert run.name == "1e3"


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 200), (4, 0), (9_999, 1999), (10_000, 2000), (1_000_000, 2000)])
def test_without_a_schedule_the_warm_up_fits_the_run_and_that_is_said(tmp_path: Path, steps: int, warmup: int) -> None:
    for run in (
        load(tmp_path, f"{MODEL}[train]\nsteps = {steps}\n"),
        load(tmp_path, MODEL, f"train.steps={steps}"),
        RunConfig(
            name="x",
            model=ModelConfig.preset("demo"),
            train=dataclasses.replace(RunConfig.load("demo", []).train, steps=steps),
        ),
    ):
        assert run.schedule.warmup_steps == warmup
    said = load(tmp_path, f"{MODEL}[train]\nsteps = {steps}\n").notes
    assert said == (
        ()
        if warmup == 2000
        else (f"schedule.warmup_steps is not set: the warm-up takes {warmup} of the {steps} steps",)
    )


def test_a_preset_made_shorter_keeps_a_warm_up_that_fits_and_that_is_said(tmp_path: Path) -> None:
    """One that was chosen for this length is refused instead."""
    (short,) = RunConfig.load("demo", ["train.steps=20"]).notes
    assert short == "schedule.warmup_steps = 40 does not fit in 20 steps: the warm-up takes 4"
    assert load(tmp_path, 'preset = "demo"\n[train]\nsteps = 20\n').schedule.warmup_steps == 4
    assert RunConfig.load("demo", ["train.steps=100"]).schedule.warmup_steps == 40  # it fits
    with pytest.raises(ConfigError, match="ends after the decay begins"):
        load(tmp_path, 'preset = "demo"\n[train]\nsteps = 20\n[schedule]\nwarmup_steps = 40\n')


def test_a_preset_may_change_a_preset(tmp_path: Path) -> None:
    run = load(tmp_path, 'preset = "demo-unbalanced"\n[optimizer]\nlr = 1e-3\n')
    demo = RunConfig.load("demo-unbalanced", [])
    assert (run.model, run.balance, run.train) == (demo.model, demo.balance, demo.train)
    assert run.optimizer == OptimizerConfig(lr=1e-3)
    assert run.schedule == dataclasses.replace(ScheduleConfig(), warmup_steps=40, final_lr=2e-4, last_lr=1e-4)


def test_a_tilde_is_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(tmp_path, MODEL + '[data]\npath = "~/shards"\n').data.path == str(tmp_path / "shards")
    assert RunConfig.load("demo", ["data.path=~/s"]).data.path == str(tmp_path / "s")


def test_a_configuration_that_is_no_file_is_one_line(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    for name in ("pipe.toml", "folder.toml", "deep.toml"):
        with pytest.raises(ConfigError, match=name):
            RunConfig.load(str(tmp_path / name), [])


def test_the_model_takes_the_tokenizers_tokens() -> None:
    run = RunConfig.load("demo", [])
    taken = run.with_tokens(None, (7,)).model
    assert (taken.bos_token_id, taken.eos_token_id) == (None, 7)
    assert run.with_tokens(5, (7, 8)).model.eos_token_id == (7, 8)
    own = RunConfig.load("demo", ["model.eos_token_id=[9, 7]"])
    assert own.with_tokens(5, (7,)).model.eos_token_id == (9, 7)
    assert own.with_tokens(5, (3,)).model.eos_token_id == 3


@pytest.mark.parametrize("key", ["train.steps", "schedule.warmup_steps"])
@pytest.mark.parametrize("digits", [12, 40, 400])
def test_a_number_that_no_float_holds_is_refused(key: str, digits: int) -> None:
    with pytest.raises(ConfigError, match="must be below"):
        RunConfig.load("demo", [f"{key}=1{'0' * digits}"])


@pytest.mark.parametrize(("name", "length", "sequences"), [("v3-671b-32k", 32768, 1920), ("v3-671b-128k", 131072, 480)])
def test_the_phases_of_long_context_are_those_of_the_report(name: str, length: int, sequences: int) -> None:
    """Section 4.3: 1,000 steps each at the last learning rate of pre-training, one YaRN for both."""
    run, base = RunConfig.load(name, []), RunConfig.load("v3-671b", [])
    assert (run.data.seq_len, run.train.batch_size, run.train.steps) == (length, sequences, 1000)
    assert {learning_rate(run, step) for step in (0, 1, 500, 999)} == {base.schedule.last_lr} == {7.3e-6}
    assert {batch_size(run, step) for step in (0, 999)} == {sequences}
    yarn = run.model.rope_scaling
    assert yarn == YarnConfig(40, 4096, beta_fast=32, beta_slow=1, mscale=1, mscale_all_dim=1)
    assert yarn.rotary_scale == 1 and yarn.softmax_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert bias_update_speed(run, 0) == bias_update_speed(base, base.train.steps - 1) == 0
    assert mtp_weight(run, 0) == mtp_weight(base, base.train.steps - 1) == 0.1
    changed = {"rope_scaling": None, "max_position_embeddings": 4096}
    assert dataclasses.replace(run.model, **changed) == base.model == ModelConfig.preset("v3-671b")
    assert run.model == ModelConfig.preset(name)
