"""Parameters, FLOPs, memory, where experts go: arithmetic on configs, no tensors."""

from leanseek.planning.flops import (
    activated_parameters,
    kv_bytes_per_token,
    kv_bytes_per_token_as,
    parameters,
    train_flops_per_token,
    training_memory,
)
from leanseek.planning.placement import expert_loads, gpu_loads, place_experts, repeats, round_robin

__all__ = [
    "activated_parameters",
    "expert_loads",
    "gpu_loads",
    "kv_bytes_per_token",
    "kv_bytes_per_token_as",
    "parameters",
    "place_experts",
    "repeats",
    "round_robin",
    "train_flops_per_token",
    "training_memory",
]
