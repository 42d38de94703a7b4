"""Which backend a folder opens into, and that a head in 8 bits is the head, whatever it was stored in."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from leanseek import Transformer, checkpoint, ops
from leanseek.backends import PanelBackend, TorchBackend, open_backend, refusal
from leanseek.native import panels
from leanseek.native.panels import Place
from leanseek.ops.quantize import quantize_blocks
from leanseek.ops.weights import named_weights

CPU = torch.device("cpu")
SIZES = {"hidden_size": 128, "moe_intermediate_size": 128}


@pytest.fixture(params=["own", "tied", "FP8"])
def folder(request: pytest.FixtureRequest, tiny_model: Callable[..., Transformer], tmp_path: Path) -> Path:
    tied = request.param == "tied"
    checkpoint.save(tiny_model(tie_word_embeddings=tied, **SIZES), tmp_path / "model", "hf-fp8")
    if request.param == "FP8":
        file = tmp_path / "model/model.safetensors"
        tensors = load_file(file)
        codes, scales = quantize_blocks(tensors["lm_head.weight"].float())
        save_file(tensors | {"lm_head.weight": codes, "lm_head.weight_scale_inv": scales}, file)
    return tmp_path / "model"


@pytest.mark.parametrize("path", ["native", "torch"])
def test_a_head_in_eight_bits(folder: Path, path: str) -> None:
    """Within a code's rounding of the head as it is stored."""
    with ops.use(path):
        backends = [open_backend(folder, CPU, int8_head=quantized, packed_copy=False)[0] for quantized in (True, False)]
        packed = path == "native" and not panels.refusal()
        assert {type(backend) for backend in backends} == {PanelBackend if packed else TorchBackend}
        hidden = torch.randn(4, SIZES["hidden_size"], dtype=backends[0].dtype)
        found, exact = (backend.logits(hidden) for backend in backends)
    assert found.dtype == torch.float32 and found.shape == (4, backends[0].config.vocab_size)
    assert 0 < float((found - exact).abs().max()) < 0.02 * float(exact.abs().max())


@pytest.mark.skipif(bool(panels.refusal()), reason=f"nothing is packed here: {panels.refusal()}")
def test_packing_within_gives_back_what_it_does_not_keep(tiny_model: Callable[..., Transformer]) -> None:
    """No module of the model stays, and of its weights those whose memory holds panels, norms and the embedding."""
    model = tiny_model(num_nextn_predict_layers=1, **SIZES).requires_grad_(False)
    config, weights = model.config, named_weights(model)
    assert not refusal(config, weights)
    released = weakref.ref(weights["layers.0.self_attn.kv_b_proj.weight"].untyped_storage())
    kept = weights["layers.1.mlp.experts.down_proj"].untyped_storage().data_ptr()
    gone = weakref.ref(model)
    del model
    backend = PanelBackend(config, weights, Place.WITHIN)
    gc.collect()
    assert not weights and gone() is None and released() is None
    assert backend._stacks[0].plan.blocks[1].down.data == kept
