"""FP8 block weights: read exactly, written as published."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from leanseek.checkpoint import load, save
from leanseek.checkpoint.blocks import quantize_blocks
from leanseek.ops import FP8_BLOCKS, dequantize_blocks

# dimensions that 128 divides not at all, and experts that it does
BLOCKY = {"hidden_size": 256, "moe_intermediate_size": 128, "kv_lora_rank": 136, "num_nextn_predict_layers": 1}


def put(folder, changes):
    file = folder / "model.safetensors"
    save_file(load_file(file) | changes, file)


def as_published(q, scale):
    """w = q · scale_inv of the block, element by element in float64."""
    rows, columns = q.shape
    values = [[float(q[i, j].float()) * float(scale[i // 128, j // 128]) for j in range(columns)] for i in range(rows)]
    return torch.tensor(values, dtype=torch.float64)


def test_every_code_dequantises_exactly_in_blocks_that_128_does_not_divide(network, tmp_path):
    """All 256 codes, both NaNs among them, in a matrix of 72 x 200: the scale is that of the element's own block."""
    model = network(hidden_size=200, kv_lora_rank=64)
    save(model, tmp_path / "out", "hf-fp8")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    q = torch.arange(72 * 200).remainder(256).to(torch.uint8).view(72, 200).view(torch.float8_e4m3fn)
    scale = torch.tensor([[0.37, 1.5e-3]])
    put(tmp_path / "out", {name: q, f"{name}_scale_inv": scale})
    loaded = load(tmp_path / "out").layers[0].self_attn.kv_a_proj_with_mqa.weight
    expected = as_published(q, scale).float().bfloat16()
    assert loaded.isnan().sum() == q.float().isnan().sum() > 0
    torch.testing.assert_close(loaded.detach(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e8m0fnu])
def test_power_of_two_scales_are_read_as_float32_or_e8m0(stored, network, tmp_path):
    save(network(**BLOCKY), tmp_path / "out", "hf-fp8")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    scale = torch.tensor([[2.0**-9], [2.0**3]])
    q = torch.randn(256, 128, generator=torch.Generator().manual_seed(3)).to(torch.float8_e4m3fn)
    put(tmp_path / "out", {name: q, f"{name}_scale_inv": scale.to(stored)})
    expected = as_published(q, scale).bfloat16()
    assert torch.equal(load(tmp_path / "out").layers[1].mlp.experts.down_proj[3], expected)
    kept = load(tmp_path / "out", keep_fp8=True).layers[1].mlp.experts
    assert kept.down_proj.scale.dtype == torch.float32
    assert torch.equal(kept.down_proj[3].dense(torch.bfloat16), expected)


def test_quantising_uses_the_whole_range_of_each_block_and_survives_zeros():
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(4))
    weight[:128, :128] = 0
    weight[128:256] *= 1e-20
    q, scale = quantize_blocks(weight)
    assert (q.shape, scale.shape) == ((300, 200), (3, 2))
    assert scale[0, 0] == 1 and (q[:128, :128].float() == 0).all()
    assert q[256:, 128:].float().abs().max() == 448
    error = (dequantize_blocks(q, scale) - weight).abs()
    assert (error <= weight.abs() / 16 + scale.repeat_interleave(128, 0)[:300, :1] * 2**-9).all()


def test_kept_and_dequantised_compute_the_same(network, tmp_path, tokens):
    model = network(**BLOCKY)
    save(model, tmp_path / "out", "hf-fp8")
    kept, plain = load(tmp_path / "out", keep_fp8=True), load(tmp_path / "out")
    for name in ("layers.0.mlp.up_proj", "layers.1.self_attn.o_proj", "mtp.0.block.self_attn.q_b_proj"):
        module = kept.get_submodule(name)
        assert module.weight.format == FP8_BLOCKS
        assert torch.equal(module.weight.dense(torch.bfloat16), plain.get_submodule(name).weight)
    experts = kept.layers[1].mlp.experts
    assert experts.gate_up_proj.format == FP8_BLOCKS and experts.gate_up_proj.scale.shape == (8, 2, 2)
    assert kept.mtp[0].eh_proj.weight.dtype == kept.embed_tokens.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        a, b, exact = kept(tokens).float(), plain(tokens).float(), model(tokens)
    assert (a - b).abs().mean() < 0.02 * b.abs().mean()  # BF16 sums in another order
    assert (b - exact).abs().mean() < 0.5 * exact.abs().mean()  # some tokens go to other experts


def test_experts_whose_halves_share_a_block_are_dequantised(network, tmp_path):
    """48 rows of gate and 48 of up lie in one stacked matrix: 128×128 blocks of it would mix them."""
    save(network(), tmp_path / "out", "hf-fp8")
    kept, plain = load(tmp_path / "out", keep_fp8=True), load(tmp_path / "out")
    experts = kept.layers[1].mlp.experts
    assert isinstance(experts.gate_up_proj, Parameter) and isinstance(experts.down_proj, Parameter)
    assert torch.equal(experts.gate_up_proj, plain.layers[1].mlp.experts.gate_up_proj)
    assert kept.layers[1].mlp.shared_experts.up_proj.weight.format == FP8_BLOCKS


def test_fused_fp8_experts_are_read(network, tmp_path):
    save(network(hidden_size=256, moe_intermediate_size=128), tmp_path / "out", "hf-fp8")
    expected = load(tmp_path / "out", keep_fp8=True).state_dict()
    file = tmp_path / "out/model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".experts." not in name}
    tensors |= {
        f"model.{name}".removesuffix(".data").replace(".scale", "_scale_inv"): tensor
        for name, tensor in expected.items()
        if ".experts." in name
    }
    save_file(tensors, file)
    again = load(tmp_path / "out", keep_fp8=True).state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[n].view(torch.uint8), expected[n].view(torch.uint8)) for n in again)


def test_what_is_quantised_is_what_deepseek_quantises(network, tmp_path):
    save(network(**BLOCKY), tmp_path / "out", "hf-fp8")
    tensors = load_file(tmp_path / "out/model.safetensors") | load_file(tmp_path / "out/mtp.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            assert tensor.dtype == torch.float32
        elif "_scale_inv" in name:
            assert tensors[name.removesuffix("_scale_inv")].dtype == torch.float8_e4m3fn
        elif any(part in name for part in ("embed_tokens", "head", "norm", ".gate.", "eh_proj")):
            assert tensor.dtype == torch.bfloat16, name
        else:
            assert tensor.dtype == torch.float8_e4m3fn and f"{name}_scale_inv" in tensors, name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["torch_dtype"] == "bfloat16"


def test_kept_fp8_is_saved_again_unchanged_and_to_hf_as_bf16(network, tmp_path):
    save(network(**BLOCKY), tmp_path / "out", "hf-fp8")
    kept = load(tmp_path / "out", keep_fp8=True)
    save(kept, tmp_path / "again", "hf-fp8")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first)
    save(kept, tmp_path / "bf16")
    plain, again = load(tmp_path / "out").state_dict(), load(tmp_path / "bf16").state_dict()
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())


def test_transformers_loads_our_fp8_folder(network, tmp_path, tokens):
    """Where 128 divides a matrix of several blocks: transformers 5.23 takes rows / blocks for the block's size."""
    pytest.importorskip("accelerate", reason="transformers loads FP8 only with accelerate")
    save(network(hidden_size=256, intermediate_size=256, moe_intermediate_size=128), tmp_path / "out", "hf-fp8")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ours = load(tmp_path / "out", dtype="bfloat16").float()
    if not torch.cuda.is_available():  # there it stays FP8 and needs its kernels
        with torch.inference_mode():
            a, b = ours(tokens), theirs.float()(tokens).logits
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
