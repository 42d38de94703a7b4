"""`convert` and `export`: streams from folder to folder."""

import errno
import json
import os

import gguf
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from leanseek.checkpoint import CheckpointError, convert, export_gguf, load, save, write_model
from leanseek.cli.convert import convert as convert_command
from leanseek.cli.export import export as export_command
from leanseek.errors import RunError

BLOCKY = {"hidden_size": 128, "moe_intermediate_size": 128, "num_nextn_predict_layers": 1}


def command(function, *arguments):
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def weights(folder):
    return load_file(folder / "model.safetensors") | load_file(folder / "mtp.safetensors")


def test_fp8_to_bf16_is_what_load_dequantises(network, tmp_path):
    save(network(**BLOCKY), tmp_path / "fp8", "hf-fp8")
    convert(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    direct, through = load(tmp_path / "fp8").state_dict(), load(tmp_path / "bf16").state_dict()
    assert direct.keys() == through.keys()
    assert all(torch.equal(direct[name], through[name]) for name in direct)
    config = json.loads((tmp_path / "bf16/config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"


def test_to_fp8_is_what_save_writes_and_back_is_a_fixed_point(network, tmp_path):
    """fp8 -> bf16 -> fp8 need not give the same codes, but bf16 -> fp8 -> bf16 of them gives the same weights."""
    model = network(**BLOCKY).bfloat16()
    save(model, tmp_path / "plain")
    save(model, tmp_path / "saved", "hf-fp8")
    convert(tmp_path / "plain", tmp_path / "converted", "fp8")
    saved, converted = weights(tmp_path / "saved"), weights(tmp_path / "converted")
    assert saved.keys() == converted.keys()
    assert all(torch.equal(saved[n].view(torch.uint8), converted[n].view(torch.uint8)) for n in saved)
    convert(tmp_path / "converted", tmp_path / "same", "fp8")  # FP8 passes through
    same = weights(tmp_path / "same")
    assert all(torch.equal(saved[n].view(torch.uint8), same[n].view(torch.uint8)) for n in saved)


def test_convert_keeps_the_bias_the_config_and_the_other_files(network, tmp_path):
    save(network(**BLOCKY), tmp_path / "in")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / "in" / name).write_text(name)
    config = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x"}}))
    seen = []
    convert(tmp_path / "in", tmp_path / "out", "bf16", progress=lambda done, total: seen.append((done, total)))
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        kind = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert torch.equal(tensor, before[name].to(kind)) and tensor.dtype == kind
    assert (tmp_path / "out/chat_template.jinja").read_text() == "chat_template.jinja"
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == config | {"auto_map": {"AutoConfig": "x"}, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in after.values())


def test_a_broken_source_or_a_taken_place_leaves_nothing(folder, tmp_path):
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(folder, folder, "bf16")
    with pytest.raises(CheckpointError, match="not one of bf16, fp8"):
        convert(folder, tmp_path / "out", "int4")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(folder, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_export_and_convert_commands_on_a_run(network, tmp_path, tokens):
    model = network(**BLOCKY)
    step = tmp_path / "run/checkpoints/step-3"
    step.mkdir(parents=True)
    write_model(model, step)
    result = command(export_command, tmp_path / "run", tmp_path / "hf")
    assert result.exit_code == 0 and "without a tokenizer" in result.stderr and result.stdout == ""
    assert torch.equal(load(tmp_path / "hf")(tokens), model(tokens))
    command(export_command, tmp_path / "run", tmp_path / "half", "--dtype", "bfloat16")
    assert load(tmp_path / "half").norm.weight.dtype == torch.bfloat16
    command(export_command, tmp_path / "run", tmp_path / "fp8", "--format", "hf-fp8")
    command(convert_command, tmp_path / "run", tmp_path / "fp8-too", "--to", "fp8")
    a, b = (load(tmp_path / name).state_dict() for name in ("fp8", "fp8-too"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    with pytest.raises(CheckpointError, match="--format 'onnx' is not one of"):
        command(export_command, tmp_path / "run", tmp_path / "x", "--format", "onnx")


BESIDE = {
    "generation_config.json": '{"eos_token_id": [1, 530], "temperature": 0.6}',
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", null]}}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "tokenizer.model": "sentencepiece",
    "tiktoken.model": "IQ== 0",
    "tokenization_kimi.py": "raise SystemExit('code that must not run')",
    "modeling_deepseek.py": "raise SystemExit('code that must not run')",
    "configuration_deepseek.py": "raise SystemExit('code that must not run')",
    "preprocessor_config.json": "{}",
    "LICENSE": "MIT",
    "README.md": "a card",
}


@pytest.fixture
def furnished(network, tmp_path):
    """A folder with every file that one may hold, and some that do not belong to the model."""
    folder = tmp_path / "in"
    save(network(**BLOCKY), folder)
    (folder / "additional_chat_templates").mkdir()
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "figures").mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    (folder / ".cache").mkdir()
    return folder


LEFT = ["figures (a folder)", "notes.txt (a link to", "pytorch_model.bin (pickled)"]


@pytest.mark.parametrize("way", ["convert bf16", "convert fp8", "export hf", "export hf-fp8"])
def test_every_file_beside_the_weights_goes_along_or_is_named(furnished, tmp_path, way):
    function, kind = way.split()
    if function == "convert":
        result = command(convert_command, furnished, tmp_path / "out", "--to", kind)
    else:
        result = command(export_command, furnished, tmp_path / "out", "--format", kind)
    assert result.exit_code == 0
    for name, text in BESIDE.items():
        assert (tmp_path / "out" / name).read_text() == text, name
    weights = {"config.json", "model.safetensors", "mtp.safetensors"}
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == weights | BESIDE.keys()
    for line in LEFT:
        assert f"left out: {line}" in result.stderr


def test_fp8_that_passes_through_keeps_what_is_said_of_it(network, tmp_path):
    save(network(**BLOCKY), tmp_path / "in", "hf-fp8")
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "out", "fp8")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


@pytest.mark.parametrize("kind", ["hf", "hf-fp8", "gguf"])
def test_the_averaged_weights_can_be_exported(network, tmp_path, kind):
    model = network(**BLOCKY)
    step = tmp_path / "run/checkpoints/step-3"
    step.mkdir(parents=True)
    write_model(model, step)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"has no averaged weights; a run keeps them with optimizer.ema"):
        command(export_command, tmp_path / "run", out, "--format", kind, "--ema")
    averaged = {f"ema.{name}": p.detach() * 0.5 for name, p in model.named_parameters()}
    save_file(averaged, step / "state.safetensors")
    assert command(export_command, tmp_path / "run", out, "--format", kind, "--ema").exit_code == 0
    if kind == "gguf":
        command(export_command, tmp_path / "run", tmp_path / "plain", "--format", kind)
        (one, other) = ({t.name: t.data for t in gguf.GGUFReader(p).tensors} for p in (out, tmp_path / "plain"))
        assert all((one[name] == other[name] * (1 if "exp_probs_b" in name else 0.5)).all() for name in other)
    elif kind == "hf":
        assert all(torch.equal(p, averaged[f"ema.{name}"]) for name, p in load(out).named_parameters())
    del averaged["ema.norm.weight"]
    save_file(averaged, step / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"ema.norm.weight is missing"):
        command(export_command, tmp_path / "run", tmp_path / "x", "--format", kind, "--ema")
    assert not list(tmp_path.glob(".*"))


WRITERS = {
    "convert": lambda folder, out: convert(folder, out, "bf16"),
    "save": lambda folder, out: save(load(folder), out),
    "gguf": lambda folder, out: export_gguf(folder, out),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(network, tmp_path, monkeypatch, writer):
    write_model(network(), tmp_path)
    room = 20_000

    def full(handle):
        if os.fstat(handle).st_size > room:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *_: raise_full())
    with pytest.raises(RunError, match=r"the disk at .* is full, .*out cannot be written: make room and run it again"):
        WRITERS[writer](tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def raise_full():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_cannot_be_written_is_one_line(network, tmp_path, writer):
    write_model(network(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/out cannot be written: (Not a directory|File exists)"):
        WRITERS[writer](tmp_path, tmp_path / "file/out")
