"""Every dtype for every kind of tensor: served with the right numbers, or refused by name when it is opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leanseek import LLM, SamplingParams, Transformer
from leanseek.checkpoint import CheckpointError, convert, export_gguf, iter_hf_tensors, load, save
from leanseek.checkpoint.blocks import dequantized
from leanseek.checkpoint.files import Lazy

SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "kv_lora_rank": 128}
WIDE = SIZES | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8}  # no choice that rounding could turn
KINDS = {
    "norm": "model.layers.1.input_layernorm.weight",
    "latent norm": "model.layers.1.self_attn.kv_a_layernorm.weight",
    "head": "lm_head.weight",
    "embedding": "model.embed_tokens.weight",
    "gate": "model.layers.1.mlp.gate.weight",
    "bias": "model.layers.1.mlp.gate.e_score_correction_bias",
    "linear": "model.layers.1.self_attn.o_proj.weight",
    "kv_b": "model.layers.1.self_attn.kv_b_proj.weight",
    "dense gate": "model.layers.0.mlp.gate_proj.weight",
    "expert gate": "model.layers.1.mlp.experts.5.gate_proj.weight",
    "expert down": "model.layers.1.mlp.experts.5.down_proj.weight",
}
FP8, SCALE = torch.float8_e4m3fn, "_scale_inv"


@pytest.fixture(scope="module")
def stored(network: Callable[..., Transformer], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The folder in BF16 (False) and in FP8 (True)."""
    folders = {fp8: tmp_path_factory.mktemp("stored") / "model" for fp8 in (False, True)}
    for fp8, folder in folders.items():
        save(network(**WIDE).bfloat16(), folder, "hf-fp8" if fp8 else "hf")
    return folders


@pytest.fixture
def place(stored: dict[bool, Path], tmp_path: Path) -> Callable[..., Path]:
    """place(fp8, change): a folder in FP8 or BF16 whose tensors `change` has changed."""

    def make(fp8: bool, change: Callable[[dict[str, Tensor]], None]) -> Path:
        folder = shutil.copytree(stored[fp8], tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").unlink()  # not written into: somebody may have mapped it
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def plain(folder: Path) -> dict[str, Tensor]:
    """The folder's weights as numbers, read and dequantised by nobody but this test and `dequantized`."""
    tensors = load_file(folder / "model.safetensors")
    lazies = {n: Lazy(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()}
    return {lazy.name: lazy.make().float() for lazy in dequantized(lazies)}


def serves(folder: Path, tokens: Tensor) -> None:
    """The engine chooses what the model says, which computes with exactly the folder's numbers."""
    model = load(folder, dtype="float32")
    found = plain(folder)
    for name in ("embedding", "head", "norm", "bias"):  # `dequantized` rounds to BF16
        ours = dict(iter_hf_tensors(model))[KINDS[name]]
        torch.testing.assert_close(ours, found[KINDS[name]], rtol=2**-8, atol=1e-6)
    with torch.inference_mode():
        want = model(tokens)
        for keep in (False, True):
            said = load(folder, keep_fp8=keep)(tokens).float()
            assert (said - want).abs().max() <= 0.06 * want.abs().max(), keep
    prompt = tokens[0].tolist()
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=1)
    out = LLM(folder, device="cpu", cache_gib=0.001).generate([prompt], params)[0].outputs[0]
    assert want[0, -1, out.token_ids[0]] >= want[0, -1].max() - 0.06 * want.abs().max()


DTYPES = (torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("kind", "fp8", "dtype"),
    [(kind, fp8, DTYPES[(i + 2 * fp8) % 3]) for i, kind in enumerate(KINDS) for fp8 in (False, True)],
)
def test_wide_dtypes_anywhere_are_served(
    place: Callable[..., Path], tokens: Tensor, kind: str, fp8: bool, dtype: torch.dtype
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        lone = {KINDS[kind]: tensors[KINDS[kind]]}
        if (scale := tensors.pop(KINDS[kind] + SCALE, None)) is not None:  # FP8 no longer
            lone[KINDS[kind] + SCALE] = scale
        lazies = {n: Lazy(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in lone.items()}
        tensors[KINDS[kind]] = next(iter(dequantized(lazies))).make().to(dtype)

    serves(place(fp8, change), tokens)


@pytest.mark.parametrize("kind", ["embedding", "head", "linear", "kv_b", "dense gate", "expert gate", "expert down"])
def test_one_fp8_matrix_among_others_is_served(place: Callable[..., Path], tokens: Tensor, kind: str) -> None:
    """Its scales count, also where what is multiplied with it has none."""

    def change(tensors: dict[str, Tensor]) -> None:
        from leanseek.ops.quantize import quantize_blocks

        codes, scale = quantize_blocks(tensors[KINDS[kind]].float())
        tensors |= {KINDS[kind]: codes, KINDS[kind] + SCALE: scale}

    serves(place(False, change), tokens)


def everywhere(folder: Path, out: Path, word: str, name: str) -> None:
    """Every way in refuses the folder with the same line."""
    ways: list[Callable[[], object]] = [
        lambda: load(folder),
        lambda: load(folder, keep_fp8=True),
        lambda: LLM(folder, device="cpu"),
        lambda: convert(folder, out, "bf16"),
        lambda: convert(folder, out, "fp8"),
        lambda: export_gguf(folder, out),
    ]
    for way in ways:
        with pytest.raises(CheckpointError, match=word) as caught:
            way()
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e5m2])
def test_other_dtypes_are_refused_by_name(
    place: Callable[..., Path], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    folder = place(False, lambda t: t.update({KINDS[kind]: t[KINDS[kind]].to(dtype)}))
    everywhere(folder, tmp_path / "out", "is stored as", KINDS[kind])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_scales_that_are_no_numbers_are_refused(place: Callable[..., Path], tmp_path: Path, dtype: torch.dtype) -> None:
    """U8 holds the exponents of E8M0: taken for numbers they are wrong by any factor."""
    name = KINDS["linear"] + SCALE
    folder = place(True, lambda t: t.update({name: torch.full(t[name].shape, 120).to(dtype)}))
    everywhere(folder, tmp_path / "out", "scales are float32", name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e8m0fnu])
def test_scales_of_other_floats_are_read(place: Callable[..., Path], tokens: Tensor, dtype: torch.dtype) -> None:
    folder = place(True, lambda t: t.update({n: s.to(dtype) for n, s in t.items() if n.endswith(SCALE)}))
    serves(folder, tokens)


def test_scales_without_fp8_and_fp8_vectors_are_refused(place: Callable[..., Path], tmp_path: Path) -> None:
    name = KINDS["expert gate"]
    folder = place(False, lambda t: t.update({name + SCALE: torch.ones(1, 1)}))
    everywhere(folder, tmp_path / "out", "but .* is bfloat16", name + SCALE)
    norm = KINDS["norm"]
    tensors = load_file(folder / "model.safetensors")
    del tensors[name + SCALE]
    tensors |= {norm: tensors[norm].to(FP8), norm + SCALE: torch.ones(1)}
    save_file(tensors, folder / "model.safetensors")
    everywhere(folder, tmp_path / "out", "which only a matrix can be", norm)
