"""The network, in pure PyTorch: one file a section of the paper."""

from leanseek.model.moe import Route, load_counts, max_violation, sequence_balance_loss, switch_balance_loss
from leanseek.model.transformer import Output, Stage, Transformer

__all__ = [
    "Output",
    "Route",
    "Stage",
    "Transformer",
    "load_counts",
    "max_violation",
    "sequence_balance_loss",
    "switch_balance_loss",
]
