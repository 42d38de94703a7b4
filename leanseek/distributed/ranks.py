"""A rank's part of a run: its stages, experts and sequences, and the one point of a step at which all ranks meet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanseek.config import ModelConfig
from leanseek.distributed.mesh import Mesh
from leanseek.distributed.sharding import Bucket, Held, buckets
from leanseek.model import Transformer
from leanseek.model.moe import Experts
from leanseek.training.config import RunConfig
from leanseek.training.part import MicroBatch, Norms, Part, Slice, squares


class RankPart(Part):
    """What of `run` this process does, at its place in `mesh`. `device`: "cpu" or "cuda", of the messages."""

    def __init__(self, run: RunConfig, mesh: Mesh, device: str):
        self.run, self.mesh, self.device = run, mesh, device
        self.rank, self.ranks, self.replicas = mesh.rank, mesh.ranks, mesh.data.size
        self.names = [name for name, _ in Transformer(run.model, "meta").named_parameters()]
        self.place = {name: i for i, name in enumerate(self.names)}
        self.buckets: list[Bucket] = []
        self.counted: set[str] = set()  # parameters whose norm this rank adds: one of those with the same elements

    # ---- what it holds ----

    def model(self, config: ModelConfig) -> Transformer:
        share = config.n_routed_experts // self.mesh.experts.size
        first = self.mesh.experts.rank * share
        return Transformer(config, experts=range(first, first + share))

    def slices(self, model: Transformer) -> dict[str, Slice]:
        experts = {p: m.numbers for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
        dense: list[Held] = []
        routed: list[Held] = []
        for name, p in model.named_parameters():
            if p in experts:
                shape = (self.run.model.n_routed_experts, *p.shape[1:])
                routed.append(Held(name, p, shape, experts[p].start * p[0].numel()))
            else:
                dense.append(Held(name, p, tuple(p.shape), 0))
        found: dict[str, Slice] = {}
        self.buckets, self.counted = [], set()
        for held, axis in ((dense, self.mesh.data), (routed, self.mesh.replicas)):
            if axis.rank == 0 or self.run.parallel.zero:
                self.counted.update(h.name for h in held)
            if axis.group is None:
                found |= {h.name: Slice(h.parameter, h.shape, h.start) for h in held}
                continue
            self.buckets += buckets(held, axis.group, self.run.parallel.zero)
        found |= dict(chain.from_iterable(bucket.pieces for bucket in self.buckets))
        return {name: found[name] for name in self.names if name in found}

    def stepped(self) -> None:
        for bucket in self.buckets:
            bucket.gather()

    # ---- what it does in a step ----

    def share(self, sequences: int) -> range:
        rank, ranks, _ = self.mesh.data
        return range(rank * sequences // ranks, (rank + 1) * sequences // ranks)

    def micro_batches(self, tokens: Tensor, size: int, sequences: int) -> list[MicroBatch]:
        """Every rank has as many: who has a sequence less than others goes along with one that does not count."""
        most = -(-sequences // self.replicas)
        own = super().micro_batches(tokens, size, sequences)
        idle = MicroBatch(tokens[:1], 0.0)
        return own + [idle] * (-(-most // (size or most)) - len(own))

    # ---- where ranks meet ----

    def reduce(self, slices: Mapping[str, Slice], sums: Tensor, counts: Tensor) -> Norms:
        for bucket in self.buckets:
            bucket.reduce()
        sizes = torch.zeros(len(self.names), dtype=torch.float64, device=sums.device)
        own = {name: s.parameter.grad for name, s in slices.items() if name in self.counted}
        sizes[[self.place[name] for name in own]] = squares(list(own.values()))
        figures = torch.cat((sums.double(), sizes))
        dist.all_reduce(figures)
        dist.all_reduce(counts)
        sums.copy_(figures[:3])
        return Norms(self.names, figures[3:])

    def total(self, values: Tensor) -> Tensor:
        if self.mesh.data.group is not None:
            values = values.to(self.device)
            dist.all_reduce(values, group=self.mesh.data.group)
        return values

    def any(self, flag: bool) -> bool:
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found)
        return bool(found)

    def gather(self, value: Any) -> list[Any]:
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.ranks)]
        dist.all_gather(sizes, torch.tensor([raw.numel()], device=self.device))
        longest = int(max(sizes))
        found = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.ranks)]
        dist.all_gather(found, torch.nn.functional.pad(raw, (0, longest - raw.numel())))
        return [json.loads(bytes(f[: int(n)].tolist())) for f, n in zip(found, sizes, strict=True)]
