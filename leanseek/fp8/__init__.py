"""FP8 training as section 3.3 describes it: formats, quantisers, and the linear and feed-forward that stand on them."""

from leanseek.fp8.layers import experts, linear, mlp
from leanseek.fp8.memory import Recomputed, live_bytes
from leanseek.fp8.recipe import PRECISIONS, Cast, Tensorwise, Tilewise, apply, observe
from leanseek.ops.formats import E4M3, E5M2, E5M6, TILE, Counts, Format
from leanseek.ops.quantize import quantize_blocks, round_e5m6

__all__ = [
    "E4M3",
    "E5M2",
    "E5M6",
    "PRECISIONS",
    "TILE",
    "Cast",
    "Counts",
    "Format",
    "Recomputed",
    "Tensorwise",
    "Tilewise",
    "apply",
    "experts",
    "linear",
    "live_bytes",
    "mlp",
    "observe",
    "quantize_blocks",
    "round_e5m6",
]
