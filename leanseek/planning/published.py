"""Published figures: the paper's table 1, speeds to hold the estimate against, and networks to compare with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from leanseek.config import ModelConfig
from leanseek.planning.flops import parameters
from leanseek.planning.hardware import GPUS
from leanseek.planning.layout import Layout, Recipe
from leanseek.planning.timing import step_time

HOURS_PER_TRILLION = 180_000  # H800 hours, section 4.2
PRETRAINING_TOKENS = 14.8e12
CONTEXT_HOURS, POSTTRAINING_HOURS = 119_000, 5_000  # table 1
H800_PRICE = 2.0  # $ an hour, table 1


@dataclass(frozen=True)
class Cost:
    hours: dict[str, float]  # H800 hours by stage, and their total
    dollars: float


def table_1() -> Cost:
    """The paper's table 1, from its published rates."""
    hours = {
        "pre-training": HOURS_PER_TRILLION * PRETRAINING_TOKENS / 1e12,
        "context extension": CONTEXT_HOURS,
        "post-training": POSTTRAINING_HOURS,
    }
    total = sum(hours.values())
    return Cost(hours | {"total": total}, total * H800_PRICE)


@dataclass(frozen=True)
class Reference:
    """A published speed of training V3, and the layout of ours that comes nearest to the one behind it."""

    name: str
    gpu: str
    recipe: Recipe
    layout: Layout
    tokens_per_second_per_gpu: float

    def estimate(self, config: ModelConfig) -> float:
        """Our tokens per second per GPU for the same."""
        seconds = step_time(config, self.recipe, self.layout, GPUS[self.gpu]).seconds
        return self.recipe.batch_size * self.recipe.seq_len / seconds / self.layout.gpus


_MEGATRON = Layout(pp=16, dp=16, ep=8, zero=True, precision="fp8")
REFERENCES = (
    Reference(
        "DeepSeek, 2,048 H800: 180 K hours per trillion tokens (4.2)",
        "h800",
        Recipe(),
        Layout(pp=16, dp=128, ep=64, zero=True, schedule="dualpipev", precision="fp8", recompute=True),
        1e12 / (HOURS_PER_TRILLION * 3600),
    ),
    # Megatron-Bridge, docs/performance-summary-archive.md. Its TP 2 and interleaving (VP 4) have no counterpart here.
    Reference(
        "Megatron-Bridge 25.09, 1,024 H100 (TP 2, PP 8, VP 4, EP 64)",
        "h100",
        Recipe(batch_size=8192),
        Layout(pp=8, dp=128, ep=64, zero=True, precision="fp8"),
        1297,
    ),
    Reference("Megatron-Bridge 25.11, 256 B200 (PP 16, EP 8)", "b200", Recipe(batch_size=2048), _MEGATRON, 2139),
    Reference("Megatron-Bridge 26.02, 256 B200 (PP 16, EP 8)", "b200", Recipe(batch_size=4096), _MEGATRON, 2689),
)


def is_v3(config: ModelConfig) -> bool:
    """Whether a network has V3's dimensions."""
    v3 = ModelConfig.preset("v3-671b")
    same = ("hidden_size", "num_hidden_layers", "num_experts_per_tok", "num_nextn_predict_layers")
    return parameters(config) == parameters(v3) and all(getattr(config, n) == getattr(v3, n) for n in same)


def baselines() -> dict[str, ModelConfig]:
    """Networks to compare with: V3 with one feed-forward as large as all its experts (its attention and cache stay),
    LLaMA-3.1-405B and Mixtral-8x22B."""
    v3 = dataclasses.replace(ModelConfig.preset("v3-671b"), num_nextn_predict_layers=0)
    dense = dataclasses.replace(v3, n_routed_experts=0, n_shared_experts=0, intermediate_size=1)
    each = 3 * v3.hidden_size * v3.num_hidden_layers
    width = 1 + round((parameters(v3) - parameters(dense)) / each)
    llama = ModelConfig(
        vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        attention="gqa", num_key_value_heads=8, n_routed_experts=0, n_shared_experts=0, num_nextn_predict_layers=0,
    )  # fmt: skip
    mixtral = ModelConfig(
        vocab_size=32768, hidden_size=6144, intermediate_size=16384, moe_intermediate_size=16384, num_hidden_layers=56,
        num_attention_heads=48, attention="gqa", num_key_value_heads=8, n_routed_experts=8, num_experts_per_tok=2,
        n_shared_experts=0, n_group=1, topk_group=1, scoring_func="softmax", topk_method="greedy",
        first_k_dense_replace=0, num_nextn_predict_layers=0,
    )  # fmt: skip
    return {
        "dense 671B": dataclasses.replace(dense, intermediate_size=width),
        "LLaMA-405B": llama,
        "Mixtral-8x22B": mixtral,
    }
