"""What every room's tests stand on: one thread, fixed seeds, and a network small enough to check by hand."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before anything imports tokenizers

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which some tests' peers do

from leanseek import native, ops
from leanseek.config import ModelConfig
from leanseek.data.prepare import prepare
from leanseek.data.tokenizer import save_tokenizer, train_tokenizer
from leanseek.engine import Engine
from leanseek.model import Transformer
from leanseek.model.layers import Linear
from leanseek.model.moe import Experts
from leanseek.native.library import STALE
from leanseek.ops.quantize import quantize_blocks
from leanseek.ops.weights import replace_weight

settings.register_profile("leanseek", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("leanseek")

# Every switch of DeepSeek-V3 on, all sizes different, so that a swapped dimension cannot go unnoticed.
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 128,
}


def pytest_sessionstart() -> None:
    """Without kernels much is skipped: that must not come from libraries that nobody has built anew."""
    if native.status().detail == STALE:
        pytest.exit(f"the kernels would be {STALE}", returncode=4)


@pytest.fixture(scope="session")
def _words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    words = ["war", "peace", "king", "queen", "and", "of", "the"]
    rows = [json.dumps({"text": " ".join(rng.choice(words, 80))}) for _ in range(80)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    prepare([folder / "text.jsonl"], folder / "shards", train_vocab=290, validation_fraction=0.2, workers=1)
    return folder


@pytest.fixture(scope="session")
def run_folder(_words: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """run_folder(config): a new folder with shards of a few words, and the configuration as run.toml."""

    def make(config: str) -> Path:
        folder = shutil.copytree(_words, tmp_path_factory.mktemp("place") / "place")
        (folder / "run.toml").write_text(config)
        return folder

    return make


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """chat_tokenizer(*added, template=None): the folder of a byte-level tokenizer with `added` special tokens."""
    text = "What is 2+2? It is 4. Be brief. User: Assistant: a king and a queen of war and peace\n\n" * 3

    def make(*added: str, template: str | None = None) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer = train_tokenizer([text], 290)
        tokenizer.add_special_tokens(list(added))
        save_tokenizer(tokenizer, folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def _randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that attention, gates and norms all matter; biases that change the choice of experts."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0.0, 0.2, generator=generator)
        elif name.endswith(("norm.weight", "layernorm.weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("embed_tokens.weight"):
            tensor.normal_(0.0, 1.0, generator=generator)
        elif name.endswith("gate.weight"):
            tensor.normal_(0.0, 0.3, generator=generator)
        elif tensor.dim() > 1:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)


@torch.no_grad()
def into_fp8_blocks(model: Transformer, *within: str) -> Transformer:
    """FP8 blocks in the place of all weights of linears and experts, or of those whose names begin with `within`."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear | Experts) or not name.startswith(within or ""):
            continue
        for leaf, weight in list(module.named_parameters(recurse=False)):
            parts = [quantize_blocks(part) for part in weight.reshape(-1, *weight.shape[-2:])]
            codes, scales = (torch.stack(both) for both in zip(*parts, strict=True))
            scales = scales.view(ops.FP8_BLOCKS.scale_shape(weight.shape))
            replace_weight(module, leaf, ops.QuantizedWeight(codes.view(weight.shape), scales, ops.FP8_BLOCKS))
    return model


@torch.no_grad()
def dequantized(model: Transformer) -> Transformer:
    """A copy whose quantised weights are float32 parameters."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for leaf, weight in list(module.named_children()):
            if isinstance(weight, ops.QuantizedWeight):
                delattr(module, leaf)
                setattr(module, leaf, torch.nn.Parameter(weight.dense(torch.float32), requires_grad=False))
    return model


@pytest.fixture
def tiny_config() -> Callable[..., ModelConfig]:
    """tiny_config(**changes): the tiny DeepSeek-V3 configuration with `changes`."""
    return lambda **changes: ModelConfig(**(TINY | changes))


@pytest.fixture
def tiny_model(tiny_config: Callable[..., ModelConfig]) -> Callable[..., Transformer]:
    """tiny_model(**changes): a network of that configuration with large random weights."""

    def build(**changes: object) -> Transformer:
        model = Transformer(tiny_config(**changes))
        _randomise(model)
        return model

    return build


@pytest.fixture
def randomise() -> Callable[..., None]:
    """randomise(module, seed=0): the same kind of weights for any other network."""
    return _randomise


@pytest.fixture
def tiny_tokens() -> torch.Tensor:
    """[2, 20] tokens of the tiny vocabulary."""
    return torch.randint(0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def small_cache() -> Iterator[None]:
    """Engines of this process that are not told otherwise have 10 MB of cache: a GB takes a second to write zeros to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Engine.__init__.__kwdefaults__, "cache_gib", 0.01)
        yield


@pytest.fixture(scope="module")
def quick_runs() -> Iterator[None]:
    """Runs of this process draw no report.html and do not measure matrix products: both take longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leanseek.training.report.write_report", lambda *_: None)
        patch.setattr("leanseek.training.loop.gemm_rate", lambda *_, **__: 1e9)
        yield
