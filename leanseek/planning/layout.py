"""Layouts of a run over GPUs, and which part of the network each rank of a pipeline holds."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from leanseek.config import ModelConfig
from leanseek.planning import flops


@dataclass(frozen=True)
class Recipe:
    """What a step trains on, and what is kept beside the weights."""

    seq_len: int = 4096
    batch_size: int = 15360  # sequences a step (4.2)
    ema: bool = True  # an average of the weights (3.2.3)


@dataclass(frozen=True)
class Layout:
    """How `pp · dp` ranks share a run; ep divides dp. The names are those of the TOML of a run."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    zero: bool = False
    fsdp: bool = False
    schedule: str = "1f1b"
    precision: str = "bf16"
    recompute: bool = False
    micro_batch_size: int = 1

    @property
    def gpus(self) -> int:
        return self.pp * self.dp

    @property
    def folded(self) -> bool:
        """Whether each rank holds two stages, the pipeline's way down and up again."""
        return self.schedule == "dualpipev" and self.pp > 1

    def micro_batches(self, recipe: Recipe) -> int:
        """Of each rank, in a step."""
        return recipe.batch_size // (self.dp * self.micro_batch_size)


@dataclass(frozen=True)
class Chunk:
    """A stage of the pipeline: some layers, with the embedding before the first and norm, head and MTP modules after
    the last."""

    layers: range
    first: bool
    last: bool

    def blocks(self, config: ModelConfig) -> range | tuple[int, ...]:
        """The numbers of its blocks, those of its MTP modules included."""
        mtp = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        return (*self.layers, *mtp) if self.last else self.layers


@cache
def split_layers(config: ModelConfig, pp: int, schedule: str) -> tuple[tuple[Chunk, ...], ...]:
    """The chunks of each rank: one, or with dualpipev two, the second in the reverse order of ranks (a V).

    Each rank gets as many layers as brings it nearest to the others' FLOPs; head and MTP modules count for the rank
    with them. Every chunk has a layer, except that the last may have none.
    """
    folded = schedule == "dualpipev" and pp > 1
    end = 0 if folded else pp - 1
    each, after = flops.split_flops(config, min(config.max_position_embeddings, 4096))
    counts = [(2 if folded else 1) - (rank == end and pp > 1) for rank in range(pp)]
    loads = [(each * n + after * (rank == end), -rank) for rank, n in enumerate(counts)]
    heapq.heapify(loads)
    for _ in range(config.num_hidden_layers - sum(counts)):
        load, rank = heapq.heappop(loads)  # the least loaded; of equals the last
        counts[-rank] += 1
        heapq.heappush(loads, (load + each, rank))
    if not folded:
        return tuple((chunk,) for chunk in _chunks(counts))
    chunks = _chunks([*(-(-n // 2) for n in counts), *(n // 2 for n in reversed(counts))])
    return tuple((chunks[rank], chunks[-1 - rank]) for rank in range(pp))


def _chunks(counts: list[int]) -> list[Chunk]:
    ends = list(accumulate(counts))
    return [
        Chunk(range(end - n, end), first=i == 0, last=i == len(counts) - 1)
        for i, (n, end) in enumerate(zip(counts, ends, strict=True))
    ]


@dataclass(frozen=True)
class Held:
    """Parameters that a rank holds, by what becomes of them. `experts` are all the routed ones: ep divides them."""

    linears: int  # multiplied in FP8 where a run does
    wide: int  # gate, eh_proj and norms
    experts: int
    embedding: int
    head: int

    @property
    def dense(self) -> int:
        """All that every rank of a stage holds."""
        return self.linears + self.wide + self.embedding + self.head

    def total(self, ep: int) -> int:
        return self.dense + self.experts // ep


@cache
def held(config: ModelConfig, chunks: tuple[Chunk, ...]) -> Held:
    """Parameters of a rank with these chunks: what `Transformer(config, stage=...)` of each has, the embedding once."""
    linears = wide = experts = 0
    for chunk in chunks:
        for layer in chunk.blocks(config):
            linears += flops.linears(config, layer)
            wide += flops.wide(config, layer)
            experts += config.n_routed_experts * flops.expert(config) if config.is_moe_layer(layer) else 0
        if chunk.last:
            wide += config.hidden_size + config.num_nextn_predict_layers * flops.mtp_extra(config)
    table = config.vocab_size * config.hidden_size
    last = any(chunk.last for chunk in chunks)
    reads = any(chunk.first for chunk in chunks) or (
        last and bool(config.num_nextn_predict_layers or config.tie_word_embeddings)
    )
    return Held(linears, wide, experts, table * reads, table * (last and not config.tie_word_embeddings))
