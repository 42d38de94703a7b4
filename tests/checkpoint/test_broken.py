"""A broken checkpoint is named in one line."""

import json
import os
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from leanseek.checkpoint import CheckpointError, convert, load, save
from leanseek.checkpoint.finite import nonfinite
from leanseek.errors import InputError

EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.fixture
def single(network, tmp_path):
    """A folder with one model.safetensors."""
    save(network(), tmp_path / "single")
    return tmp_path / "single"


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert isinstance(caught.value, InputError) and "\n" not in message
    assert all(word in message for word in words), message
    return message


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_json(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_sound_folders_load(folder, single):
    """Nothing below is refused for another reason than the one it breaks."""
    assert load(folder).config.vocab_size == load(single).config.vocab_size == 320
    assert len(list(folder.glob("model-*.safetensors"))) >= 3


def test_no_folder_no_config(single, tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist")
    (single / "config.json").unlink()
    refused(single, "has no config.json")


@pytest.mark.parametrize(
    ("text", "word"), [("{", "not valid JSON"), ("[]", "JSON object"), ("\udcff", "not valid JSON")]
)
def test_config_that_is_no_json_object(single, text, word):
    (single / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(single, "config.json", word)


def test_missing_tensors_are_named_and_counted(single):
    change_tensors(single, lambda t: t.pop(EXPERT))
    assert refused(single, EXPERT, "is missing").endswith("is missing")
    change_tensors(single, lambda t: [t.pop("model.norm.weight"), t.pop("model.layers.0.mlp.up_proj.weight")])
    refused(single, "is missing (and 2 more)")


def test_wrong_shape_says_both(single):
    change_tensors(single, lambda t: t.update({EXPERT: torch.zeros(48, 65)}))
    refused(single, EXPERT, "[48, 65]", "[48, 64]")


def test_tensors_of_another_network(single):
    change_tensors(single, lambda t: t.update({"model.layers.1.self_attn.indexer.wk.weight": torch.zeros(2)}))
    refused(single, "indexer.wk.weight does not belong to this network")


def test_harmless_extras_are_passed_over(single):
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.3.enorm.weight": torch.zeros(64),  # MTP that the config does not count
    }
    change_tensors(single, lambda t: t.update(extras))
    assert load(single)


def test_partly_absent_mtp_is_missing_and_wholly_absent_a_warning(network, tmp_path):
    save(network(num_nextn_predict_layers=1), tmp_path / "out")
    tensors = load_file(tmp_path / "out/mtp.safetensors")
    tensors.pop("model.layers.3.eh_proj.weight")
    save_file(tensors, tmp_path / "out/mtp.safetensors")
    refused(tmp_path / "out", "model.layers.3.eh_proj.weight is missing")
    (tmp_path / "out/mtp.safetensors").unlink()
    with pytest.warns(UserWarning, match="promises MTP modules but has none"):
        model = load(tmp_path / "out")
    assert model.config.num_nextn_predict_layers == len(model.mtp) == 0


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1, -70_000])
def test_truncation_at_any_place_names_the_file(folder, keep):
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, shard.name, "truncated")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_corrupt_headers(single, header):
    (single / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(single, "model.safetensors is corrupt")


@pytest.mark.parametrize("code", ["C64", "F4"])
def test_unknown_dtypes(single, code):
    header = f'{{"a": {{"dtype": "{code}", "shape": [1], "data_offsets": [0, 4]}}}}'.encode()
    (single / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(single, code, "not supported")


def test_integer_weights(single):
    change_tensors(single, lambda t: t.update({EXPERT: torch.zeros(48, 64, dtype=torch.int8)}))
    refused(single, EXPERT, "int8")


@pytest.mark.parametrize("entry", ["../secret.safetensors", "/etc/passwd", "sub/../../x.safetensors"])
def test_weight_map_that_leaves_its_folder(folder, entry):
    shutil.copy(next(folder.glob("model-00001*")), folder.parent / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    change_json(index, lambda value: value["weight_map"].update({EXPERT: entry}))
    refused(folder, entry, "leaves its folder")


def test_links_out_of_the_folder(folder, tmp_path):
    shard = next(folder.glob("model-00001*"))
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, shard.name, "leaves its folder")


def test_links_of_the_hub_cache_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in folder.iterdir():
        os.rename(file, blobs / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    assert len(load(snapshot).mtp) == 1


def test_index_names_what_is_not_there(folder):
    shard = next(folder.glob("model-00002*"))
    index = folder / "model.safetensors.index.json"
    change_json(index, lambda value: value["weight_map"].update({"model.norm.weight": shard.name}))
    refused(folder, "model.norm.weight", shard.name)
    shard.unlink()
    refused(folder, shard.name, "not in the folder")
    index.write_text('{"weight_map": ["a"]}')
    refused(folder, "has no weight_map")


def test_weights_that_are_not_safetensors(single):
    (single / "model.safetensors").unlink()
    refused(single, "neither model.safetensors nor model.safetensors.index.json")
    (single / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(single, "pickled", "never loaded")


@pytest.mark.parametrize("kind", ["deepseek_v32", "llama"])
def test_other_architectures(single, kind):
    change_json(single / "config.json", lambda value: value.update(model_type=kind))
    refused(single, "config.json", kind)


@pytest.mark.parametrize(
    "scheme", [{"quant_method": "awq"}, {"quant_method": "fp8", "weight_block_size": [1, 32]}, {"quant_method": "fp8"}]
)
def test_other_quantisations(single, scheme):
    change_json(single / "config.json", lambda value: value.update(quantization_config=scheme))
    refused(single, "quantization_config", scheme["quant_method"])


def test_fp8_without_or_with_wrong_scales(network, tmp_path):
    save(network(), tmp_path / "out", "hf-fp8")
    change_tensors(tmp_path / "out", lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(2, 1)}))
    refused(tmp_path / "out", f"{EXPERT}_scale_inv", "[2, 1]")
    change_tensors(tmp_path / "out", lambda t: t.pop(f"{EXPERT}_scale_inv"))
    refused(tmp_path / "out", EXPERT, "scales", "missing")


def test_an_unknown_dtype_is_refused(single):
    with pytest.raises(CheckpointError, match="dtype 'int4' is not one of auto, float32"):
        load(single, dtype="int4")


# ---- sizes, before anything is built ----


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2"), ({"num_hidden_layers": 1}, "num_hidden_layers = 1"),
        ({"num_hidden_layers": 4096}, "num_hidden_layers = 4096"), ({"n_routed_experts": 65536}, "n_routed_experts = 65536"),
        ({"n_routed_experts": 16}, "n_routed_experts = 16"), ({"first_k_dense_replace": 3}, "has 8 routed experts"),
    ],
)  # fmt: skip
def test_a_config_of_another_size_is_refused(single, change, says):
    change_json(single / "config.json", lambda value: value.update(change))
    refused(single, says)


def test_mtp_may_only_add(network, tmp_path):
    save(network(num_nextn_predict_layers=1), tmp_path / "out")
    tensors = load_file(tmp_path / "out/mtp.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(64)}, tmp_path / "out/mtp.safetensors")
    refused(tmp_path / "out", "mtp.safetensors", "model.norm.weight", "may only add")


def raw(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(shape, *offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)}, "shares bytes"),
        ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, "shares bytes"),
        ({"a": tensor([1], 0, 4), "b": tensor([2], 8, 16)}, "gap"), ({"a": tensor([3], 4, 16)}, "gap"),
        ({"a": tensor([3], 0, 12)}, "belong to no tensor"), ({"a": tensor([4.0], 0, 16)}, "whole numbers"),
        ({"a": tensor([True], 0, 4)}, "whole numbers"), ({"a": tensor("4", 0, 16)}, "whole numbers"),
        ({"a": tensor([1] * 9, 0, 4)}, "whole numbers"), ({"a": tensor([2**60], 0, 16)}, "whole numbers"),
        (b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 16]}}', "Infinity"),
        (b'{"a": 1, "a": 2}', "appears twice"), (b'{"a":' * 100_000, "brackets"),
    ],
)  # fmt: skip
def test_headers_that_no_file_has(single, header, says):
    raw(single / "model.safetensors", header, bytes(16))
    refused(single, "model.safetensors", says)


@pytest.mark.parametrize("shape", [[0, 2, 4], [2, 0, 4], [2**40, 0, 4], [2, 3, 4]])
def test_stacks_of_no_experts(single, shape):
    size = 4 * shape[0] * shape[1] * shape[2]
    raw(single / "model.safetensors", {"model.layers.1.mlp.experts.gate_up_proj": tensor(shape, 0, size)}, bytes(size))
    refused(single, "gate_up_proj", "no stack of experts")


def test_a_header_of_any_length_is_not_read(single):
    with (single / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)  # takes no disk
    refused(single, "8,589,934,592 bytes")


def test_a_model_larger_than_memory_is_refused_with_the_figures(single, monkeypatch):
    monkeypatch.setattr("leanseek.checkpoint.hf.memory", lambda device: 2**17)
    refused(single, "its weights take 0.0 GiB", "cpu")


# ---- links ----


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "generation_config.json", "chat_template.jinja", "tokenizer_config.json"],
)
def test_no_file_of_a_model_is_a_link_out_of_it(single, tmp_path, name):
    if not (single / name).exists():
        (single / name).write_text("{}")
    (single / name).rename(tmp_path / "elsewhere")
    (single / name).symlink_to(tmp_path / "elsewhere")
    refused(single, name, "leaves its folder", "allow_links")
    assert load(single, allow_links=True)


def test_links_of_a_volume_and_of_a_cache_that_was_moved_are_followed(folder, tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    folder.rename(volume / "..2026_01")
    (volume / "..data").symlink_to("..2026_01")
    for file in (volume / "..2026_01").iterdir():
        (volume / file.name).symlink_to(f"..data/{file.name}")
    assert load(volume)
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "other disk"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (tmp_path / "models--x/blobs").symlink_to(blobs)
    for file in (volume / "..2026_01").iterdir():
        (blobs / f"sha-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    assert load(snapshot)


# ---- numbers that are none ----


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", EXPERT, "model.layers.1.mlp.gate.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_written(single, tmp_path, name, value):
    change_tensors(single, lambda t: t[name].view(-1)[3:5].fill_(value))
    for write in (
        lambda out, **more: convert(single, out, "bf16", **more),
        lambda out, **more: save(load(single), out, **more),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"{name} (2)")):
            write(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.warns(UserWarning, match=re.escape(f"{name} (2)")):
            write(tmp_path / "out", allow_nonfinite=True)
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("tensor", "count"),
    [
        (torch.tensor([0x7F, 0xFF, 0x7E, 0], dtype=torch.uint8).view(torch.float8_e4m3fn), 2),
        (torch.tensor([0xFF, 0x7F, 0], dtype=torch.uint8).view(torch.float8_e8m0fnu), 1),
        (torch.full((1000,), torch.finfo(torch.float32).max), 0), (torch.tensor([-torch.inf]).half(), 1),
        (torch.tensor([3, 4]), 0), (torch.zeros(0), 0), (torch.full((2, 3), torch.nan, dtype=torch.float64), 6),
    ],
)  # fmt: skip
def test_nonfinite_values_are_counted(tensor, count):
    assert nonfinite(tensor) == count
