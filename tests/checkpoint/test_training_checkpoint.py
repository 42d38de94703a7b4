"""A checkpoint to resume from is whole or not there: written at once, verified when read, thinned out by a policy."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from leanseek import load
from leanseek.checkpoint import CheckpointError, resolve
from leanseek.checkpoint import writer as room
from leanseek.checkpoint.pieces import pieces_of
from leanseek.checkpoint.training import (
    newest_checkpoint,
    prune,
    read_checkpoint,
    set_aside,
    steps_on_disk,
)
from leanseek.checkpoint.writer import Writer
from leanseek.errors import RunError
from leanseek.model import Transformer

Write = Callable[..., Path]


@pytest.fixture
def model(network: Callable[..., Transformer]) -> Transformer:
    return network(num_nextn_predict_layers=1)


@pytest.fixture
def write(tmp_path: Path, model: Transformer) -> Write:
    """write(step): a checkpoint of `model` with two state tensors in tmp_path/run."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "tokenizer.json").write_text("{}")
    (data / "tokenizer_config.json").write_text("{}")

    def run(step: int) -> Path:
        tensors = {"exp_avg.x": torch.full((3, 5), step, dtype=torch.bfloat16), "step.x": torch.tensor(float(step))}
        with Writer(tmp_path / "run", keep_last=9) as writer:
            weights, state = pieces_of(model.state_dict()), pieces_of(tensors)
            writer.save(step, model.config, weights, state, {"samples": 7 * step}, data)
        return tmp_path / f"run/checkpoints/step-{step}"

    return run


def test_what_was_written_is_read(write: Write, model: Transformer, tmp_path: Path) -> None:
    """The model as a Hugging Face folder, the tokenizer beside it, the state with its dtypes, scalars too."""
    folder = write(3)
    assert folder == resolve(tmp_path / "run")
    assert (folder / "tokenizer.json").is_file()
    loaded = load(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    found = read_checkpoint(folder)
    assert (found.step, found.state["samples"]) == (3, 21)
    assert torch.equal(found.tensors["exp_avg.x"].read(), torch.full((3, 5), 3, dtype=torch.bfloat16))
    assert found.tensors["step.x"].read().shape == ()


def test_the_balancing_bias_is_float32_on_disk_whatever_the_model(write: Write, model: Transformer) -> None:
    """Megatron-LM#1482: steps of γ = 0.001 vanish in BF16."""
    exact = model.layers[1].mlp.gate.e_score_correction_bias.clone()
    model.bfloat16()
    with safe_open(write(1) / "model.safetensors", "pt") as file:
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert torch.equal(file.get_tensor(name), exact)
        assert file.get_tensor("model.layers.1.mlp.gate.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_found(
    write: Write, tmp_path: Path, name: str, damage: str
) -> None:
    write(5)
    victim = write(10) / name
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    victim.write_bytes(raw if damage == "flip" else raw[: len(raw) // 2])
    if damage == "remove":
        victim.unlink()
    found, passed = newest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.step == 5
    assert len(passed) == 1
    assert name in passed[0]
    set_aside(tmp_path / "run", found.step)
    assert resolve(tmp_path / "run").name == "step-5"
    assert read_checkpoint(write(10)).step == 10  # its name is free again


def test_no_whole_checkpoint_is_no_checkpoint(write: Write, tmp_path: Path) -> None:
    (write(5) / "state.json").write_text('["not", "a", "state"]')
    found, passed = newest_checkpoint(tmp_path / "run")
    assert found is None
    assert len(passed) == 1
    assert newest_checkpoint(tmp_path / "elsewhere") == (None, [])


@pytest.mark.parametrize("victim", ["write_file", "write_config", "copy_tokenizer", "checksum", "_sync"])
def test_a_write_that_fails_leaves_what_was_there(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """At whichever file the disk is full."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(5)
    monkeypatch.setattr(room, victim, full)
    with pytest.raises(RunError, match=r"the disk at .* is full, .*run cannot be written: make room"):
        write(10)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-5"]
    assert read_checkpoint(tmp_path / "run/checkpoints/step-5").step == 5


def test_nothing_bears_the_name_before_everything_is_on_disk(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever instant a kill comes at: every file and the folder are synced first, and state.json is complete."""
    synced: list[str] = []
    sync = room._sync

    def watch(path: Path) -> None:
        synced.append(path.name)
        if path.name != "checkpoints":
            assert not (tmp_path / "run/checkpoints/step-4").exists()
        sync(path)

    monkeypatch.setattr(room, "_sync", watch)
    folder = write(4)
    assert set(synced) == {p.name for p in folder.iterdir()} | {".step-4.partial", "checkpoints"}
    assert set(json.loads((folder / "state.json").read_text())["files"]) == {p.name for p in folder.iterdir()} - {
        "state.json"
    }


def test_old_checkpoints_are_thinned_out(write: Write, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 4, 6, 8, 10):
        write(step)
    (run / "checkpoints/.step-9.partial").mkdir()  # of a run killed while writing
    prune(run, keep_last=2, keep_every=6)
    assert steps_on_disk(run) == [6, 8, 10]
    assert not list((run / "checkpoints").glob(".*"))


def test_reading_something_else_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json is missing or corrupt"):
        read_checkpoint(tmp_path)
