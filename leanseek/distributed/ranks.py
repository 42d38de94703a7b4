"""A rank's part of a run: its stages, experts and sequences, and the one point of a step at which all ranks meet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanseek.checkpoint.pieces import Piece
from leanseek.checkpoint.ranks import Ranks
from leanseek.config import ModelConfig
from leanseek.data.batch import Batch
from leanseek.distributed import experts, watch
from leanseek.distributed.exchange import Exchange
from leanseek.distributed.mesh import Mesh, stages
from leanseek.distributed.pipeline import Pipeline, Place
from leanseek.distributed.sharding import Bucket, FullySharded, Held, buckets, first_row, local
from leanseek.model import Transformer
from leanseek.model.moe import Experts
from leanseek.training.config import RunConfig
from leanseek.training.part import Forward, Norms, Part, Slice, squares
from leanseek.training.trainer import compute_dtype


class RankPart(Part):
    """What of `run` this process does, at its place in `mesh`. `device`: "cpu" or "cuda", of the messages."""

    def __init__(self, run: RunConfig, mesh: Mesh, device: str):
        self.run, self.mesh, self.device = run, mesh, device
        self.rank, self.ranks, self.replicas = mesh.rank, mesh.ranks, mesh.data.size
        whole = Transformer(run.model, "meta")
        self.order = {name: i for i, (name, _) in enumerate(whole.named_parameters())}
        self.routed = _routed(whole).keys()
        self.buckets: list[Bucket] = []
        self.shards: FullySharded | None = None
        self.pipeline: Pipeline | None = None
        self.objects = dist.new_group(backend="gloo")  # for what is no tensor

    # ---- what it holds ----

    def model(self, config: ModelConfig) -> Transformer:
        share = config.n_routed_experts // self.mesh.experts.size
        first = self.mesh.experts.rank * share
        held = stages(config, self.run.parallel, self.mesh.pipeline.rank)
        return Transformer(config, stages=held, experts=range(first, first + share))

    def attach(self, model: Transformer, device: torch.device) -> None:
        rank, size, group = self.mesh.pipeline
        if group is not None and self.mesh.backwards is not None:
            c = self.run.model
            self.pipeline = Pipeline(
                self.run.parallel.schedule,
                Place(size, rank, (group, self.mesh.backwards)),
                lookahead=c.lookahead,
                width=c.hidden_size,
                dtype=compute_dtype(self.run, device),
                device=device,
                copied=model.embed_tokens.weight if self.copied and rank in (0, size - 1) else None,
                overlap=self.mesh.experts.size > 1,
                trace=self.run.parallel.trace,
            )
        if self.mesh.experts.size > 1:
            wire = self.run.train.precision == "fp8"
            experts.apply(model, Exchange(self.mesh.hops, self.run.model.n_routed_experts, fp8=wire))
        if self.run.parallel.fsdp:
            self.shards = FullySharded(model, *self.mesh.shards)  # moves each module to the device by itself
        model.to(device)

    @property
    def copied(self) -> bool:
        """Whether the first stage and the last, on other ranks, both hold the embedding."""
        c, p = self.run.model, self.run.parallel
        reads = c.tie_word_embeddings or c.num_nextn_predict_layers > 0
        return reads and p.pp > 1 and p.schedule != "dualpipev"

    def names(self, model: Transformer) -> list[str]:
        return list(self.order)

    def pieces(self, model: Transformer) -> list[Piece]:
        routed = _routed(model)
        return [
            Piece(name, *_place(self.run.model, tensor, routed.get(name)), local(tensor))
            for name, tensor in model.state_dict().items()
        ]

    def keeps(self, name: str) -> bool:
        if self.shards is not None and name in self.shards.shards:
            return True
        own = (self.mesh.replicas if name in self.routed else self.mesh.data).rank == 0
        return own and not self._a_copy(name)

    def _a_copy(self, name: str) -> bool:
        """Whether it is the last stage's embedding, which the first has too."""
        return self.copied and name == "embed_tokens.weight" and self.mesh.pipeline.rank > 0

    def slices(self, model: Transformer) -> dict[str, Slice]:
        zero, routed, found = self.run.parallel.zero, _routed(model), dict[str, Slice]()
        self.buckets = []
        if self.shards is not None:
            own = self.shards.shards
            placed = ((n, _place(self.run.model, p, routed.get(n))) for n, p in model.named_parameters())
            return {name: Slice(own[name], *place) for name, place in placed if own[name].numel()}
        for axis, wanted in ((self.mesh.data, False), (self.mesh.replicas, True)):
            held = [
                Held(
                    name,
                    p,
                    *_place(self.run.model, p, routed.get(name)),
                    (zero or axis.rank == 0) and not self._a_copy(name),
                )
                for name, p in model.named_parameters()
                if (name in routed) is wanted
            ]
            if axis.group is None:
                found |= {h.name: Slice(*h[1:]) for h in held}
            else:
                self.buckets += buckets(held, axis.group, zero)
        found |= dict(chain.from_iterable(bucket.pieces for bucket in self.buckets))
        return {name: found[name] for name in self.order if name in found}

    def stepped(self) -> None:
        for holder in self._holders():
            holder.gather()

    def _holders(self) -> list[Bucket] | list[FullySharded]:
        return self.buckets if self.shards is None else [self.shards]

    # ---- what it does in a step ----

    def share(self, sequences: int) -> range:
        rank, ranks, _ = self.mesh.data
        return range(rank * sequences // ranks, (rank + 1) * sequences // ranks)

    def micro_batches(self, batch: Batch, size: int) -> list[Batch]:
        """Every rank has as many: who has a sequence less than others goes along with one that does not count."""
        most = -(-batch.sequences // self.replicas)
        own = super().micro_batches(batch, size)
        return own + [batch.idle()] * (-(-most // (size or most)) - len(own))

    def accumulate(
        self, model: Transformer, batches: Sequence[Batch], forward: Forward
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if self.pipeline is None:
            return super().accumulate(model, batches, forward)
        return self.pipeline.accumulate(batches, forward)

    def evaluate(self, model: Transformer, batch: Batch, forward: Forward) -> Tensor:
        if self.pipeline is None:
            found = super().evaluate(model, batch, forward)
            if self.shards is not None:
                self.shards.release()
            return found
        sums = self.pipeline.evaluate([batch], forward)
        with watch.phase("the losses of an evaluation"):
            dist.all_reduce(sums, group=self.mesh.pipeline.group)
        return sums[:2]

    def draw(self, out: Path) -> None:
        if self.pipeline is not None and self.mesh.data.rank == 0:
            self.pipeline.draw(out)

    # ---- where ranks meet ----

    def reduce(self, slices: Mapping[str, Slice], sums: Tensor, counts: Tensor) -> Norms:
        for holder in self._holders():
            holder.reduce()
        sizes = torch.zeros(len(self.order), dtype=torch.float64, device=sums.device)
        own = {name: s.parameter.grad for name, s in slices.items() if s.first}
        sizes[[self.order[name] for name in own]] = squares(list(own.values()))
        figures = torch.cat((sums.double(), sizes))
        with watch.phase("the sum of losses and counts", kind="device" if figures.is_cuda else "wait"):
            dist.all_reduce(figures)
            dist.all_reduce(counts)
            if figures.is_cuda:
                torch.cuda.current_stream().synchronize()  # here a rank waits for all that its device waits for
        sums.copy_(figures[:3])
        return Norms(list(self.order), figures[3:])

    def total(self, values: Tensor) -> Tensor:
        if self.mesh.data.group is not None:
            values = values.to(self.device)
            with watch.phase("the sum of an evaluation"):
                dist.all_reduce(values, group=self.mesh.data.group)
        return values

    def any(self, flag: bool) -> bool:
        """Also on whoever has started the ranks."""
        found = torch.tensor(int(flag or watch.stop_wanted()), device=self.device)
        with watch.phase("the end of a step"):
            dist.all_reduce(found)
            return bool(found)

    def gather(self, value: Any) -> list[Any]:
        return self._gather(value, "an exchange of figures")

    def about(self, what: str) -> Ranks:
        return _About(self, what)

    # ---- what is said of it ----

    def in_words(self, threads: int) -> str:
        p, (_, data, _) = self.run.parallel, self.mesh.data
        layout = [f"pp {p.pp} ({p.schedule})" if p.pp > 1 else "pp 1", f"dp {data}"]
        more = [f"ep {p.ep}"] * (p.ep > 1) + ["ZeRO-1"] * p.zero + ["FSDP"] * p.fsdp
        return ", ".join([f"{self.ranks} processes of {super().in_words(threads)}: {' × '.join(layout)}", *more])

    def begin(self, step: int) -> None:
        watch.step(step + 1)

    def seconds(self, whole: float) -> dict[str, list[float]]:
        spent = watch.spent()
        own = [whole - sum(spent.values()), spent["exchange"], spent["wait"]]
        table = torch.zeros(self.ranks, len(own), dtype=torch.float64)
        table[self.rank] = torch.tensor(own, dtype=torch.float64)
        with watch.phase("the figures of a step"):
            dist.all_reduce(table, group=self.objects)
        names = ("compute_s", "exchange_s", "wait_s")
        return {name: [round(s, 5) for s in own] for name, own in zip(names, table.T.tolist(), strict=True)}

    def _gather(self, value: Any, what: str) -> list[Any]:
        found: list[Any] = [None] * self.ranks
        with watch.phase(what):
            dist.all_gather_object(found, value, group=self.objects)
        return found


class _About(Ranks):
    """The ranks of a part, whose waits have a name."""

    def __init__(self, part: RankPart, what: str):
        self.rank, self.ranks, self.part, self.what = part.rank, part.ranks, part, what

    def gather(self, value: Any) -> list[Any]:
        return self.part._gather(value, self.what)


def _routed(model: Transformer) -> dict[str, range]:
    """The parameters of routed experts, and the numbers of those that the model holds."""
    stacks = {p: m.numbers for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    return {name: stacks[p] for name, p in model.named_parameters() if p in stacks}


def _place(config: ModelConfig, tensor: Tensor, numbers: range | None) -> tuple[tuple[int, ...], int]:
    """The shape of the network's tensor, and the first of its elements in this rank's."""
    start = first_row(tensor) * math.prod(tensor.shape[1:])
    if numbers is None:
        return tuple(tensor.shape), start
    return (config.n_routed_experts, *tensor.shape[1:]), numbers.start * math.prod(tensor.shape[1:]) + start
