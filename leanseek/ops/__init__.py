"""Everything with more than one implementation. Each op is one function with a torch reference beside it."""

from leanseek.ops.adamw import AdamW, adamw
from leanseek.ops.attention import causal_attention, mla_attention
from leanseek.ops.cross_entropy import linear_cross_entropy
from leanseek.ops.deferred import WeightGradients, weight_gradients
from leanseek.ops.dispatch import ordinary, row_invariant, use
from leanseek.ops.experts import Dispatched, expert_combine, expert_dispatch, expert_products, experts, route_order
from leanseek.ops.grouped import Groups, grouped_gradient, grouped_product
from leanseek.ops.head_linear import head_linear
from leanseek.ops.latent_attention import CacheIndex, latent_attention
from leanseek.ops.linear import linear
from leanseek.ops.norm import rms_norm
from leanseek.ops.rotary import rotate
from leanseek.ops.sampling import Choice, finite_rows, logprobs, sample, token_logprobs
from leanseek.ops.select import expert_scores, select_experts
from leanseek.ops.swiglu import swiglu
from leanseek.ops.weights import (
    FP8_BLOCKS,
    INT8_ROWS,
    QuantizedWeight,
    StoredWeight,
    dense,
    dequantize_blocks,
    quantize_rows,
)

__all__ = [
    "FP8_BLOCKS",
    "INT8_ROWS",
    "AdamW",
    "CacheIndex",
    "Choice",
    "Dispatched",
    "Groups",
    "QuantizedWeight",
    "StoredWeight",
    "WeightGradients",
    "adamw",
    "causal_attention",
    "dense",
    "dequantize_blocks",
    "expert_combine",
    "expert_dispatch",
    "expert_products",
    "expert_scores",
    "experts",
    "finite_rows",
    "grouped_gradient",
    "grouped_product",
    "head_linear",
    "latent_attention",
    "linear",
    "linear_cross_entropy",
    "logprobs",
    "mla_attention",
    "ordinary",
    "quantize_rows",
    "rms_norm",
    "rotate",
    "route_order",
    "row_invariant",
    "sample",
    "select_experts",
    "swiglu",
    "token_logprobs",
    "use",
    "weight_gradients",
]
