"""The network, in pure PyTorch: one file a section of the paper."""

from leanseek.model.moe import (
    Route,
    load_counts,
    max_violation,
    sample_balance_loss,
    sequence_balance_loss,
    switch_balance_loss,
)
from leanseek.model.packing import Lengths, Shared, membership, without_padding
from leanseek.model.transformer import Output, Stage, Transformer

__all__ = [
    "Lengths",
    "Output",
    "Route",
    "Shared",
    "Stage",
    "Transformer",
    "load_counts",
    "max_violation",
    "membership",
    "sample_balance_loss",
    "sequence_balance_loss",
    "switch_balance_loss",
    "without_padding",
]
