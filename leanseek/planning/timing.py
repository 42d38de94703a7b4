"""How long a step takes: products at measured shares of the peak, exchanges at measured rates, bubbles by formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from leanseek.config import ModelConfig
from leanseek.planning import flops, hardware
from leanseek.planning.hardware import Gpu
from leanseek.planning.layout import Chunk, Layout, Recipe, held, split_layers
from leanseek.planning.memory import BF16, CODES, FLOAT32, WIRE, reach
from leanseek.planning.schedules import Times


@dataclass(frozen=True)
class Work:
    """Seconds of a chunk on one micro-batch. Exchanges are those of experts' rows."""

    forward: float = 0.0
    inputs: float = 0.0  # backward, gradients of inputs, with what is computed again
    weights: float = 0.0  # backward, gradients of weights
    shared: float = 0.0  # of forward: the shared experts, beside which an exchange can run
    exchange: float = 0.0  # dispatch and combine of one direction; backward exchanges as much

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self._all(), other._all(), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * value for value in self._all()))

    def _all(self) -> tuple[float, ...]:
        return self.forward, self.inputs, self.weights, self.shared, self.exchange

    @property
    def backward(self) -> float:
        return self.inputs + self.weights


# ---- one block, a token ----


@cache
def block_work(config: ModelConfig, layer: int, gpu: Gpu, precision: str, recompute: bool, seq_len: int) -> Work:
    """Seconds a token of one block's compute; exchanges are added by layout (`chunk_work`)."""
    c, fp8 = config, precision == "fp8"
    peak, share = (gpu.fp8 if fp8 else gpu.bf16), hardware.SHARES[precision]
    moe = c.is_moe_layer(layer)
    linears, experts = flops.linears(c, layer), flops.expert(c) * c.num_experts_per_tok if moe else 0
    product = 2 * linears / (peak * share.forward) + 2 * experts / (peak * share.experts)
    weights = 2 * linears / (peak * share.weight) + 2 * experts / (peak * share.experts_weight)
    gate = 2 * c.n_routed_experts * c.hidden_size / (gpu.fp32 * hardware.FLOAT32) if moe else 0.0
    core = flops.attention_flops(c, seq_len)
    forward = product + gate + core / (gpu.bf16 * hardware.ATTENTION)
    inputs = product + 2 * gate + 2 * core / (gpu.bf16 * hardware.ATTENTION_BACKWARD)
    if c.attention == "mla" and (fp8 or recompute):  # the up-projections again
        up = (c.q_lora_rank or 0) * c.num_attention_heads * c.qk_head_dim
        up += c.kv_lora_rank * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        inputs += 2 * up / (peak * share.forward)
    rate = gpu.bandwidth * hardware.MEMORY
    forward += _forward_bytes(c, moe, fp8) / rate
    inputs += _backward_bytes(c, moe, fp8) / rate
    shared = c.n_shared_experts * flops.expert(c) if moe else 0
    return Work(forward, inputs, weights, 2 * shared / (peak * share.forward))


def _widths(c: ModelConfig) -> tuple[int, int, int]:
    """Values a token of the latents, of the queries, and of keys and values."""
    if c.attention == "mla":
        heads = c.num_attention_heads
        latents = (c.q_lora_rank or 0) + c.kv_lora_rank
        return latents, heads * c.qk_head_dim, heads * (c.qk_nope_head_dim + c.v_head_dim)
    return 0, c.num_attention_heads * c.gqa_head_dim, 2 * c.kv_heads * c.gqa_head_dim


def _forward_bytes(c: ModelConfig, moe: bool, fp8: bool) -> float:
    """Bytes a token that a block's elementwise kernels read and write; a product's own are part of its rate."""
    d, (latents, q, kv) = c.hidden_size, _widths(c)
    out = c.num_attention_heads * (c.v_head_dim if c.attention == "mla" else c.gqa_head_dim)
    code = CODES if fp8 else BF16
    total: float = 2 * 4 * d + 4 * latents  # norms
    total += 2 * 6 * d  # residuals
    total += 2 * (2 * q + kv) + 4 * q  # rotation: read queries and keys, write both
    if fp8:
        total += (BF16 + CODES) * (2 * d + latents + out) + 4 * out  # quantised; the attention's result to E5M6
    if not moe:
        return (
            total + BF16 * 2 * c.intermediate_size + code * c.intermediate_size + _kept_codes(fp8) * c.intermediate_size
        )
    k, i, shared = c.num_experts_per_tok, c.moe_intermediate_size, c.n_shared_experts * c.moe_intermediate_size
    total += 2 * code * k * d  # rows in the order of experts
    total += (k * i + shared) * (BF16 * 2 + code + _kept_codes(fp8))  # SwiGLU
    return total + BF16 * (k + 1) * d + (6 * d if shared else 0)  # summed over experts


def _kept_codes(fp8: bool) -> float:
    return 2 * CODES if fp8 else 0.0


def _backward_bytes(c: ModelConfig, moe: bool, fp8: bool) -> float:
    """As `_forward_bytes`; gradients are quantised by rows and turned, inputs turned."""
    d, (latents, q, kv) = c.hidden_size, _widths(c)
    out = c.num_attention_heads * (c.v_head_dim if c.attention == "mla" else c.gqa_head_dim)
    total: float = 2 * 6 * d + 6 * latents  # norms
    total += 2 * 6 * d  # residuals
    total += 2 * (2 * q + kv) + 4 * q + 2 * 2 * (q + q + kv)  # rotation again, and its gradient
    both = 2 * CODES  # written by rows and turned
    if fp8:
        total += 4 * (d + latents)  # norms again
        total += (BF16 + both) * (d + q + kv + latents + d)  # gradients of every linear's result
        total += 2 * CODES * (2 * d + latents) + (BF16 + CODES) * out  # inputs, turned
    k, i = (c.num_experts_per_tok, c.moe_intermediate_size) if moe else (1, c.intermediate_size)
    inner = k * i + (c.n_shared_experts * i if moe else 0)
    read = BF16 + 2 * (CODES if fp8 else BF16)  # SwiGLU's gradient and what was kept
    written = 2 * both + CODES if fp8 else 3 * BF16
    total += inner * (read + written)
    if moe:
        total += k * d * ((BF16 + both) + 2 * CODES if fp8 else 4 * BF16)  # rows of gradients, and of inputs again
        total += BF16 * (k + 1) * d  # summed over experts
    return total


# ---- a chunk, a micro-batch ----


@cache
def chunk_work(
    config: ModelConfig, chunk: Chunk, gpu: Gpu, precision: str, recompute: bool, seq_len: int, ep: int
) -> Work:
    """Seconds a token of a chunk."""
    total = Work()
    for layer in chunk.blocks(config):
        total += block_work(config, layer, gpu, precision, recompute, seq_len)
        if config.is_moe_layer(layer) and ep > 1:
            total += Work(exchange=exchange(config, gpu, ep, precision))
    if chunk.last:  # the head runs and is differentiated in BF16, in forward; eh_proj is BF16 too
        share, d = hardware.SHARES["bf16"], config.hidden_size
        depths = config.num_nextn_predict_layers
        head = 2 * (1 + depths) * config.vocab_size * d / gpu.bf16
        join = 2 * depths * 2 * d * d / gpu.bf16
        logits = (1 + depths) * config.vocab_size * 3 * BF16 / (gpu.bandwidth * hardware.MEMORY)
        forward = 2 * head / share.forward + head / share.weight + logits
        total += Work(forward + join / share.forward, join / share.forward, join / share.weight)
    return total


def exchange(config: ModelConfig, gpu: Gpu, ep: int, precision: str) -> float:
    """Seconds a token of one dispatch and one combine: the slower of the network, which a row crosses once a node,
    and NVLink, once a rank. FP8 goes out in codes; what comes back is BF16 (3.3.3)."""
    to = reach(config, ep, gpu.node)
    sent = config.hidden_size * ((WIRE if precision == "fp8" else BF16) + BF16)
    return max(to.ranks * sent / gpu.nvlink, to.away * sent / (gpu.network * hardware.NETWORK))


# ---- a step ----


@dataclass(frozen=True)
class Step:
    """Seconds of a step of the slowest rank."""

    compute: float
    bubble: float
    exchange: float  # of experts' rows
    exposed: float  # of it, and of hops between stages, not hidden
    slowed: float  # what compute loses to the multiprocessors that exchange beside it
    gradients: float  # reduced and weights gathered again, not hidden
    optimizer: float
    hidden: float  # share of all ranks' exchanges that is

    @property
    def seconds(self) -> float:
        return self.compute + self.bubble + self.exposed + self.slowed + self.gradients + self.optimizer


def step_time(config: ModelConfig, recipe: Recipe, layout: Layout, gpu: Gpu) -> Step:
    """The slowest rank's step."""
    batches = layout.micro_batches(recipe)
    ranks = []
    for rank, works in enumerate(_works(config, recipe, layout, gpu)):
        times = _times(works, config, recipe, layout, gpu)
        ranks.append(_pipelined(works, times, rank, layout, batches, gpu))
    slowest = max(ranks, key=lambda step: step.seconds)
    reduced, optimizer = _update(config, layout, gpu, batches)
    if layout.fsdp:
        reduced = max(0.0, reduced * batches - slowest.compute)
    moved, seen = sum(step.exchange for step in ranks), sum(step.exposed for step in ranks)
    return dataclasses.replace(
        slowest,
        bubble=max(step.bubble for step in ranks),
        gradients=reduced,
        optimizer=optimizer,
        hidden=max(0.0, 1 - seen / moved) if moved else 1.0,
    )


def stage_times(config: ModelConfig, recipe: Recipe, layout: Layout, gpu: Gpu) -> Times:
    """Seconds of a stage on a micro-batch, on the slowest rank: what draws the plan's timeline."""
    ranks = (_times(works, config, recipe, layout, gpu) for works in _works(config, recipe, layout, gpu))
    return max(ranks, key=lambda times: times.forward + times.backward)


def bubble_seconds(schedule: str, ranks: int, times: Times) -> float:
    """How long a rank waits in a step (DualPipe's table; PP stages are twice the ranks with dualpipev)."""
    forward, backward, weight, pair = times
    each = {
        "1f1b": forward + backward,
        "zb1p": forward + backward - 2 * weight,
        "dualpipev": pair + backward - 3 * weight,
    }[schedule]
    return (ranks - 1) * max(0.0, each)


def _works(config: ModelConfig, recipe: Recipe, layout: Layout, gpu: Gpu) -> Iterator[list[Work]]:
    """Of each rank, its chunks' work on a micro-batch."""
    tokens = layout.micro_batch_size * recipe.seq_len
    how = gpu, layout.precision, layout.recompute, recipe.seq_len, layout.ep
    for chunks in split_layers(config, layout.pp, layout.schedule):
        yield [chunk_work(config, chunk, *how) * tokens for chunk in chunks]


def _times(works: list[Work], config: ModelConfig, recipe: Recipe, layout: Layout, gpu: Gpu) -> Times:
    """Of one of a rank's chunks, on average. Alone, an exchange runs beside the shared experts; in a pair beside all
    compute of the other direction, which then lacks the multiprocessors that exchange."""
    hop = 0.0
    if layout.pp > 1:  # to the next stage
        hop = layout.micro_batch_size * recipe.seq_len * BF16 * config.hidden_size / (gpu.network * hardware.NETWORK)
    mean = sum(works[1:], works[0]) * (1 / len(works))
    forward = mean.forward + max(0.0, mean.exchange - mean.shared) + hop
    backward = mean.backward + max(0.0, mean.exchange - 2 * mean.shared) + hop
    both = 2 * mean.exchange
    compute = (mean.forward + mean.backward) * _slower(mean, gpu)
    return Times(forward, backward, mean.weights, compute + max(both - compute, hardware.UNHIDDEN * both))


def _pipelined(works: list[Work], times: Times, rank: int, layout: Layout, batches: int, gpu: Gpu) -> Step:
    """One rank over all its micro-batches: what it computes, and what of the exchanges it waits for."""
    total, ranks = sum(works[1:], works[0]), layout.pp
    chunks = len(works) * batches
    pairs = 0
    if layout.folded:  # planning/schedules.py, steps 4 and 5
        pairs = 2 * (batches - 2 * ranks + rank + 1) + (ranks - rank - 1) - (rank == ranks - 1)
    busy = pairs * times.pair + (chunks - pairs) * (times.forward + times.backward)
    compute = batches * (total.forward + total.backward)
    slowed = pairs * (total.forward + total.backward) / len(works) * (_slower(total, gpu) - 1)
    waiting = bubble_seconds(layout.schedule, ranks, times)
    return Step(compute, waiting, 2 * batches * total.exchange, busy - compute - slowed, slowed, 0.0, 0.0, 0.0)


def _slower(work: Work, gpu: Gpu) -> float:
    """How much longer compute takes beside an exchange."""
    return 1 / (1 - hardware.EXCHANGE_SMS / gpu.sms) if work.exchange else 1.0


def _update(config: ModelConfig, layout: Layout, gpu: Gpu, batches: int) -> tuple[float, float]:
    """Seconds to reduce the gradients and gather the weights (ZeRO-1 and all-reduce move the same), and of AdamW with
    its casts, on the fullest rank. With FSDP the first is a micro-batch's: gathered twice, reduced once."""
    moved = FLOAT32 * (3 if layout.fsdp else 2)
    link = gpu.nvlink if layout.dp <= gpu.node else gpu.network * hardware.NETWORK
    replicas = layout.dp // layout.ep
    slowest = longest = 0.0
    for chunks in split_layers(config, layout.pp, layout.schedule):
        has = held(config, chunks)
        seconds = has.dense * (1 - 1 / layout.dp) + has.experts / layout.ep * (1 - 1 / replicas)
        seconds *= moved / link
        shard = (has.dense + has.experts) / layout.dp
        own = shard if layout.fsdp else has.total(layout.ep)
        updated = shard if layout.zero else own
        moments = 2 * (BF16 if layout.precision == "fp8" else FLOAT32)
        state = updated * (3 * FLOAT32 + 2 * moments)  # read weight, gradient and moments, write all but the gradient
        casts = 0.0
        if layout.precision == "fp8":  # once a step; of what FSDP gathers, each time
            casts = (2 * batches * has.total(layout.ep) if layout.fsdp else own) * (FLOAT32 + 2)
        clip = own * FLOAT32
        slowest = max(slowest, seconds)
        longest = max(longest, (state + casts + clip) / (gpu.bandwidth * hardware.MEMORY))
    return slowest, longest
