"""FP8 training (3.3): recipes, the linear and feed-forward built on them, and the modules that use them."""

from leanseek.fp8.layers import expert_products, linear, mlp
from leanseek.fp8.memory import Recomputed, live_bytes
from leanseek.fp8.modules import PRECISIONS, apply, forget, observe
from leanseek.fp8.recipe import Cast, GradientBlocks, Tensorwise, Tilewise

__all__ = [
    "PRECISIONS",
    "Cast",
    "GradientBlocks",
    "Recomputed",
    "Tensorwise",
    "Tilewise",
    "apply",
    "expert_products",
    "forget",
    "linear",
    "live_bytes",
    "mlp",
    "observe",
]
