"""A run that begins with a checkpoint's weights (`from`): whose network it has, what may differ, how it is resumed."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from leanseek import ModelConfig, load, save
from leanseek.checkpoint.training import checkpoint_folder
from leanseek.cli import app
from leanseek.config import ConfigError
from leanseek.data.prepare import prepare
from leanseek.errors import InputError
from leanseek.model import Transformer
from leanseek.training import RunConfig, Trainer, train
from leanseek.training.metrics import read_rows
from leanseek.training.origin import first_model
from leanseek.training.part import Part
from tests.small import run_toml

PRETRAINING = run_toml(
    {"initializer_range": 0.05, "max_position_embeddings": 24},
    name="base",
    data={"seq_len": 24},
    train={"steps": 2, "batch_size": 4},
    balance={"bias_update_speed": 0.01},
)
LONGER = """
name = "longer"
[model]
max_position_embeddings = 96
rope_scaling = {factor = 4, original_max_position_embeddings = 24}
[data]
seq_len = 96
[train]
steps = 6
batch_size = 2
dtype = "float32"
device = "cpu"
[optimizer]
lr = 1e-3
[checkpoint]
every = 2
"""
pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def place(run_folder: Callable[[str], Path]) -> Path:
    """Shards, the file of a longer run as run.toml, and runs/base, which has ended."""
    folder = run_folder(LONGER)
    (folder / "base.toml").write_text(PRETRAINING)
    base = RunConfig.load(str(folder / "base.toml"), [f"data.path={folder / 'shards'}"])
    train(base, runs=folder / "runs")
    return folder


def longer(place: Path, *overrides: str, runs: Path | None = None, source: Path | None = None) -> RunConfig:
    """The run that begins with base's weights."""
    begun = [] if source == Path() else [f"from={source or place / 'runs/base'}"]
    return RunConfig.load(str(place / "run.toml"), [f"data.path={place / 'shards'}", *begun, *overrides], runs)


def test_the_network_is_the_checkpoints_and_what_the_file_says_of_rope(place: Path) -> None:
    run = longer(place)
    base = RunConfig.load(str(place / "base.toml"), []).model
    assert run.model.max_position_embeddings == 96 and run.model.rope_scaling is not None
    assert run.model.hidden_size == base.hidden_size and run.model.n_routed_experts == 4
    assert run.source == str(place / "runs/base")
    assert RunConfig.from_dict(tomllib.loads(run.to_toml())) == run


def test_weights_biases_and_nothing_else_come_from_the_checkpoint(place: Path) -> None:
    """The gate's balancing biases too. Moments begin anew, and so does the position in the data."""
    run = longer(place)
    base = load(place / "runs/base")
    model = first_model(run.source, run.train.seed, run.model, Part())
    expected, found = base.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert any(name.endswith("bias") and value.any() for name, value in found.items())
    assert Trainer(run, model).state_tensors() == {}


def test_mtp_modules_may_be_left_behind(place: Path) -> None:
    run = longer(place, "model.num_nextn_predict_layers=0")
    model = first_model(run.source, run.train.seed, run.model, Part())
    assert not any(name.startswith("mtp.") for name in model.state_dict())


def test_a_folder_in_fp8_blocks_is_dequantised(place: Path, tmp_path: Path, tiny_config) -> None:
    config = tiny_config(hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2)
    save(Transformer(config).init_weights(0), tmp_path / "fp8", format="hf-fp8")
    expected = load(tmp_path / "fp8", dtype="float32").state_dict()
    found = first_model(str(tmp_path / "fp8"), 0, config, Part()).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_resumed_bit_for_bit_when_the_checkpoint_it_began_with_is_gone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(longer(place), runs=tmp_path / "whole").folder
    base, ours = tmp_path / "moved", tmp_path / "runs"
    shutil.copytree(place / "runs/base", base)
    run = longer(place, source=base)
    stop = iter([False, False, False, True])
    monkeypatch.setattr(Part, "any", lambda self, flag: next(stop, False))
    with pytest.raises(BaseException, match="stopped at step 4"):
        train(run, runs=ours)
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match="moved does not exist"):
        longer(place, source=base)
    assert longer(place, runs=ours, source=Path()).source == str(base)  # `from` may be left away
    folder = train(longer(place, runs=ours, source=base), resume=True, runs=ours).folder
    for name in ("model.safetensors", "state.safetensors"):
        files = [checkpoint_folder(f, 6) / name for f in (folder, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_killed_before_its_first_checkpoint_it_begins_with_the_weights_again(place: Path, tmp_path: Path) -> None:
    whole = train(longer(place), runs=tmp_path / "whole").folder
    (tmp_path / "runs/longer").mkdir(parents=True)
    (tmp_path / "runs/longer/config.toml").write_text(longer(place).to_toml())
    folder = train(longer(place, runs=tmp_path / "runs"), resume=True, runs=tmp_path / "runs").folder
    files = [checkpoint_folder(f, 6) / "model.safetensors" for f in (folder, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=64", "model.hidden_size = 64, but .* has 32"),
        ("model.num_hidden_layers=1", "model.num_hidden_layers = 1, but .* has 2"),
        ("model.num_hidden_layers=3", "model.num_hidden_layers = 3, but .* has 2"),
        ("model.n_routed_experts=8", "model.n_routed_experts = 8, but .* has 4"),
        ("model.num_nextn_predict_layers=2", "model.num_nextn_predict_layers = 2, but .* has 1"),
        ("model.tie_word_embeddings=true", "model.tie_word_embeddings = True, but .* has False"),
        ("model.attention=gqa", "model.attention = 'gqa', but .* has 'mla'"),
        ("model.topk_method=greedy", "model.topk_method = 'greedy', but .* has 'noaux_tc'"),
        ("data.seq_len=97", "data.seq_len = 97 is beyond model.max_position_embeddings = 96"),
        ("from=3", "from must be the path of a folder, not 3"),
        ("from=nowhere", "from: nowhere does not exist"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused_by_name(place: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        longer(place, override)
    assert "\n" not in str(caught.value)


def test_data_of_another_tokenizer_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, run_folder: Callable[[str], Path]
) -> None:
    prepare([place / "text.jsonl"], tmp_path / "other", train_vocab=280, validation_fraction=0.2, workers=1)
    with pytest.raises(ConfigError, match=r"other has another tokenizer than .*base"):
        train(longer(place, f"data.path={tmp_path / 'other'}"), runs=tmp_path / "runs")
    assert not (tmp_path / "runs/longer").exists()


def test_weights_without_a_tokenizer_are_taken_with_a_line(place: Path, tmp_path: Path) -> None:
    save(load(place / "runs/base"), tmp_path / "bare")
    folder = train(longer(place, "train.steps=1", source=tmp_path / "bare"), runs=tmp_path / "runs").folder
    said = [row["message"] for row in read_rows(folder / "metrics.jsonl") if "event" in row]
    assert any("bare has no tokenizer.json" in line for line in said)
    assert any("started at step 0 with the weights of" in line for line in said)


def test_a_damaged_checkpoint_is_refused(place: Path, tmp_path: Path) -> None:
    source = shutil.copytree(place / "runs/base", tmp_path / "base")
    weights = checkpoint_folder(source, 2) / "model.safetensors"
    spoilt = bytearray(weights.read_bytes())
    spoilt[-1] ^= 1
    weights.write_bytes(spoilt)
    with pytest.raises(InputError, match=r"model\.safetensors is missing, truncated or corrupt"):
        train(longer(place, source=source), runs=tmp_path / "runs")


def test_a_resumed_run_keeps_its_beginning(place: Path, tmp_path: Path) -> None:
    train(longer(place, "train.steps=1"), runs=tmp_path)
    other = shutil.copytree(place / "runs/base", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"from = .*other', but .*longer began with the weights of .*base"):
        train(longer(place, source=other), resume=True, runs=tmp_path)


def test_the_command_takes_from_and_resumes_without_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", str(place / "run.toml"), f"data.path={place / 'shards'}", "train.steps=2", "--json"]
    done = CliRunner().invoke(app, [*command, "--from", str(place / "runs/base")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, [*command, "train.steps=3", "--resume"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["step"] == 3


def test_a_config_of_a_checkpoint_is_not_a_default_of_ours(place: Path) -> None:
    """Only keys that the file gives override: no default of ModelConfig gets into the network."""
    assert longer(place).model.initializer_range == 0.05 != ModelConfig().initializer_range
