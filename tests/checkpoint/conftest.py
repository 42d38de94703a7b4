"""Small networks of every kind the room reads and writes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from leanseek.checkpoint import save
from leanseek.config import ModelConfig, YarnConfig
from leanseek.model import Transformer

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.1,
}
V2 = {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
}
KINDS = {
    "v3": {},
    "v3-mtp": {"num_nextn_predict_layers": 2},
    "v2": V2,
    "v2-groups": V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": 24},
    "tied": {"tie_word_embeddings": True},
    "no-q-lora": {"q_lora_rank": None},
    "yarn": {"rope_scaling": YarnConfig(40, 64, mscale_all_dim=1.0), "max_position_embeddings": 2560},
    "dense": {"n_routed_experts": 0},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _network(**changes: object) -> Transformer:
    model = Transformer(ModelConfig.from_dict(SMALL | changes)).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def network() -> Callable[..., Transformer]:
    """network(**changes): a random model of the small config with `changes`."""
    return _network


@pytest.fixture(params=KINDS)
def any_network(request: pytest.FixtureRequest) -> Transformer:
    """A random model of each kind in turn."""
    return _network(**KINDS[request.param])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder of a small V3 with MTP, in three shards or so; tests break it."""
    save(_network(num_nextn_predict_layers=1), tmp_path / "model", max_shard_bytes=300_000)
    return tmp_path / "model"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(2))
