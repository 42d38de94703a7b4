"""Bytes on the fullest GPU of a layout, part by part, as the trainer keeps them and as the paper does."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from leanseek.config import ModelConfig
from leanseek.planning.hardware import GiB
from leanseek.planning.layout import Chunk, Held, Layout, Recipe, held, split_layers

BF16, FLOAT32 = 2, 4
CODES = 1 + 4 / 128  # bytes a value of a 1×128 tile: E4M3 and a float32 scale
WIRE = 1 + 1 / 128  # between ranks a scale is the exponent alone (distributed/exchange.py)
LOGITS = 2**27 * (BF16 + FLOAT32)  # of one piece of the head's loss on a GPU (ops/cross_entropy.py)
RESERVE = 4 * GiB  # CUDA context, NCCL's channels, gaps of the allocator: a guess


def memory(config: ModelConfig, recipe: Recipe, layout: Layout, node: int = 8, paper: bool = False) -> dict[str, int]:
    """Bytes by part on the rank of the pipeline that needs the most; `node`: ranks in a node.

    paper: weights in BF16 beside float32 masters that ZeRO-1 shards with both BF16 moments, and the average of the
    weights on the host (3.2.3, 3.3.3). Else as the trainer keeps them: float32 weights, which are the masters.
    """
    parts = (rank_memory(config, recipe, layout, rank, node, paper) for rank in range(layout.pp))
    return max(parts, key=lambda part: sum(part.values()))


def rank_memory(
    config: ModelConfig, recipe: Recipe, layout: Layout, rank: int, node: int = 8, paper: bool = False
) -> dict[str, int]:
    """As `memory`, on one rank of the pipeline."""
    chunks = split_layers(config, layout.pp, layout.schedule)[rank]
    has, tokens = held(config, chunks), layout.micro_batch_size * recipe.seq_len
    flying = in_flight(layout, rank, layout.micro_batches(recipe))
    whole = has.total(layout.ep)
    shard = (has.dense + has.experts) // layout.dp  # experts: over ep first, then over their dp / ep replicas
    resident, kept = shard if layout.fsdp else whole, shard if layout.fsdp or layout.zero else whole
    moment = BF16 if layout.precision == "fp8" or paper else FLOAT32
    parts = {
        "weights": (BF16 if paper else FLOAT32) * resident,
        "masters": FLOAT32 * kept if paper else 0,
        "gradients": FLOAT32 * resident,
        "moments": 2 * moment * kept,
        "ema": FLOAT32 * kept if recipe.ema and not paper else 0,
        "weight_casts": _casts(has, layout, flying),
        "gathered_weights": _gathered(config, layout) if layout.fsdp else 0,
        "activations": _activations(config, layout, chunks, flying, node) * tokens,
        "workspace": _workspace(config, layout) * tokens,
        "logits": _logits(config, chunks),
        "exchange_buffers": _exchange_buffers(config, layout, node) * tokens,
        "reserve": RESERVE,
    }
    return {name: int(size) for name, size in parts.items()}


def in_flight(layout: Layout, rank: int, micro_batches: int) -> tuple[int, ...]:
    """Micro-batches of which a rank keeps activations at most, for each of its chunks (planning/schedules.py)."""
    if layout.pp == 1:
        return (1,)
    if layout.folded:  # forwards of either chunk before the first chunk's first backward
        return min(micro_batches, 2 * layout.pp - rank), min(micro_batches, rank + 1)
    return (min(micro_batches, layout.pp - (rank if layout.schedule == "1f1b" else 0)),)


# ---- weights ----


def _casts(has: Held, layout: Layout, flying: tuple[int, ...]) -> float:
    """FP8: blocks of linears and experts in both orders, also of what FSDP has gathered. BF16: autograd keeps the cast
    weight of a linear with each forward, unless its gradient can wait; experts are cast again in backward."""
    if layout.precision == "fp8":
        return 2 * (1 + FLOAT32 / 128**2) * (has.linears + has.experts // layout.ep)
    return BF16 * has.linears * sum(flying) if layout.pp == 1 or layout.schedule == "1f1b" else 0.0


def _gathered(config: ModelConfig, layout: Layout) -> float:
    """FSDP: one block computing and one on its way, and the gradients of the one before, in float32."""
    blocks = (held(config, (Chunk(range(i, i + 1), False, False),)) for i in range(config.num_hidden_layers))
    return max(block.total(layout.ep) for block in blocks) * 3 * FLOAT32


# ---- activations: bytes a token ----


@cache
def _block_activations(config: ModelConfig, layer: int, precision: str, recompute: bool) -> float:
    """What backward finds of one block (tests/planning/test_memory.py holds it against the allocator)."""
    c, fp8 = config, precision == "fp8"
    value: float = CODES if fp8 else BF16  # of a linear's input
    kept: float
    d, norms = c.hidden_size, 2
    if c.attention == "mla":
        latents = (c.q_lora_rank or 0) + c.kv_lora_rank
        kept = BF16 * (latents + c.qk_rope_head_dim)
        if not recompute:  # the latents after their norms
            kept += value * latents
            norms += 2 if c.q_lora_rank else 1
        heads = c.qk_head_dim + c.qk_nope_head_dim + c.v_head_dim
        if not fp8:  # FP8 computes queries, keys and values again
            kept += BF16 * c.num_attention_heads * heads
        elif c.q_lora_rank is None:
            kept += BF16 * d  # the queries are made again from what came out of the norm
        out = c.num_attention_heads * c.v_head_dim
    else:
        kept = BF16 * c.gqa_head_dim * (c.num_attention_heads + 2 * c.kv_heads)
        out = c.num_attention_heads * c.gqa_head_dim
    kept += BF16 * out + FLOAT32 * c.num_attention_heads  # and the sums of the softmax
    kept += 2 * (BF16 + value) * d  # both residuals, and what comes out of the norms after them
    inner = c.intermediate_size
    if c.is_moe_layer(layer):
        kept += value * 2 * c.moe_intermediate_size * c.num_experts_per_tok
        kept += 4 * c.n_routed_experts + 44 * c.num_experts_per_tok + 8  # scores, choices, places, gate values
        inner = c.n_shared_experts * c.moe_intermediate_size
    return kept + FLOAT32 * norms + inner * (2 * CODES if fp8 else 3 * BF16)


@cache
def activation_bytes_per_token(
    config: ModelConfig, chunk: Chunk, precision: str, recompute: bool, received: float = 0.0
) -> float:
    """Bytes that a forward of a chunk keeps for backward, per token. received: rows that an MoE layer gets of other
    ranks, per token, and has to keep."""
    value = CODES if precision == "fp8" else BF16
    total, row = 0.0, BF16 * config.hidden_size
    for layer in chunk.blocks(config):
        total += _block_activations(config, layer, precision, recompute)
        if config.is_moe_layer(layer):
            total += received * value * config.hidden_size
    if chunk.last:
        depths = config.num_nextn_predict_layers
        total += (1 + depths) * (2 * row + FLOAT32)  # each norm's input, and the gradient of the head's
        total += depths * (4 * row + 2 * FLOAT32)  # embedding and hidden before their norms, and both after
    return total


def _activations(
    config: ModelConfig, layout: Layout, chunks: tuple[Chunk, ...], flying: tuple[int, ...], node: int
) -> float:
    received = reach(config, layout.ep, node).ranks if layout.ep > 1 else 0.0
    return sum(
        number * activation_bytes_per_token(config, chunk, layout.precision, layout.recompute, received)
        for chunk, number in zip(chunks, flying, strict=True)
    )


# ---- what lives for a moment ----


def _workspace(config: ModelConfig, layout: Layout) -> float:
    """Gradients inside the widest feed-forward's backward, or the attention's, per token."""
    c = config
    dense = 6 * BF16 * c.intermediate_size
    experts = 0
    if c.n_routed_experts:
        experts = BF16 * c.num_experts_per_tok * (c.hidden_size + 3 * c.moe_intermediate_size)
    head = 3 * c.qk_head_dim + 2 * (c.qk_nope_head_dim + c.v_head_dim) if c.attention == "mla" else 6 * c.gqa_head_dim
    return max(dense, experts, BF16 * c.num_attention_heads * head)


def _logits(config: ModelConfig, chunks: tuple[Chunk, ...]) -> float:
    """The head's float32 gradient, made in forward once a depth, its product in BF16, and a piece of the logits."""
    if not any(chunk.last for chunk in chunks):
        return 0
    table = config.vocab_size * config.hidden_size
    return table * (FLOAT32 * (1 + config.num_nextn_predict_layers) + BF16) + LOGITS


def _exchange_buffers(config: ModelConfig, layout: Layout, node: int) -> float:
    """Rows on their way: sent once a node and received once a rank, in BF16, in both directions of a pair."""
    if layout.ep == 1:
        return 0
    to = reach(config, layout.ep, node)
    return (2 if layout.folded else 1) * BF16 * config.hidden_size * (to.nodes + to.ranks)


# ---- where a token's rows go ----


class Reach(NamedTuple):
    """How many nodes and ranks hold an expert of a token, on average under even routing, its own among them."""

    nodes: float
    ranks: float
    away: float  # of the nodes, those that are not the token's own


@cache
def reach(config: ModelConfig, ep: int, node: int) -> Reach:
    """Where rows go with experts over `ep` ranks, `node` of them in each node."""
    nodes = -(-ep // node)
    reached = _reached(config, nodes)
    return Reach(reached, _reached(config, ep), reached * (1 - 1 / nodes))


def _reached(c: ModelConfig, boxes: int) -> float:
    """Of `boxes` with equal shares of the experts, those with a chosen one. Under node-limited routing (2.1.2) each of
    the topk_group groups counts as hit: never more than topk_group nodes, where nodes are groups."""
    if not c.grouped_routing:
        return _hit(boxes, c.n_routed_experts, c.num_experts_per_tok)
    if boxes <= c.n_group:
        return _hit(boxes, c.n_group, c.topk_group)
    each = -(-c.num_experts_per_tok // c.topk_group)
    return c.topk_group * _hit(boxes / c.n_group, c.n_routed_experts // c.n_group, each)


def _hit(boxes: float, items: int, drawn: int) -> float:
    """Boxes of equal size that hold one of `drawn` of `items`, on average."""
    missed, size = 1.0, items / boxes
    for i in range(drawn):
        missed *= max(0.0, 1 - size / (items - i))
    return boxes * (1 - missed)
