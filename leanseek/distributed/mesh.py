"""The ranks of a run, seen twice (3.2): pipeline × data for the dense weights, pipeline × replicas × experts for the
routed experts. Both count the same ranks in the same order."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from leanseek.config import ConfigError, ModelConfig
from leanseek.model import Stage
from leanseek.planning import schedules
from leanseek.planning.layout import split_layers
from leanseek.training.config import ParallelConfig, RunConfig
from leanseek.training.schedules import batch_size


class Mesh(NamedTuple):
    """This rank's groups. A group of one rank is None: there is nobody to talk to."""

    rank: int
    ranks: int
    pipeline: Axis  # the stages of one replica
    backwards: dist.ProcessGroup | None  # the same ranks: gradients do not wait behind hidden states
    data: Axis  # ranks with the same dense weights
    experts: Axis  # ranks among which each layer's experts are spread
    replicas: Axis  # ranks with the same experts
    shards: tuple[DeviceMesh, DeviceMesh]  # `data` and `replicas`, as FSDP2 takes them
    hops: tuple[dist.ProcessGroup, ...]  # the ways of a token to an expert: to its node, then to its rank there (3.2.2)


class Axis(NamedTuple):
    rank: int  # this rank's place
    size: int
    group: dist.ProcessGroup | None


def build_mesh(run: RunConfig, device: str) -> Mesh:
    """The mesh of the process group that runs.

    Raises:
        ConfigError: the layout does not fit the ranks, the network or the batch.
    """
    p, ranks = run.parallel, dist.get_world_size()
    check_layout(run, ranks)
    data, nodes = ranks // p.pp, p.ep // p.ranks_per_node if 0 < p.ranks_per_node < p.ep else 1
    dense = init_device_mesh(device, (p.pp, data), mesh_dim_names=("pipeline", "data"))
    sparse = init_device_mesh(device, (p.pp, data // p.ep, p.ep), mesh_dim_names=("_", "replicas", "experts"))
    ways = init_device_mesh(device, (ranks // p.ep, nodes, p.ep // nodes), mesh_dim_names=("_", "node", "local"))
    back = init_device_mesh(device, (p.pp, data), mesh_dim_names=("back", "_")).get_group("back") if p.pp > 1 else None
    pipeline, replica, share, copies = (
        Axis(mesh.get_local_rank(name), mesh[name].size(), mesh.get_group(name) if mesh[name].size() > 1 else None)
        for mesh, name in ((dense, "pipeline"), (dense, "data"), (sparse, "experts"), (sparse, "replicas"))
    )
    hops = (ways.get_group("node"), ways.get_group("local")) if nodes > 1 else (sparse.get_group("experts"),)
    return Mesh(
        dist.get_rank(), ranks, pipeline, back, replica, share, copies, (dense["data"], sparse["replicas"]), hops
    )


def check_layout(run: RunConfig, ranks: int) -> None:
    """
    Raises:
        ConfigError: the layout of `run` does not fit `ranks` processes; the line says what would.
    """
    p, m, t = run.parallel, run.model, run.train
    if p.cp > 1:
        raise ConfigError(
            f"parallel.cp = {p.cp}: a sequence is not divided over ranks (docs/scale-out.md says why); set it to 1"
        )
    if ranks == 1 and max(p.pp, p.ep) > 1:
        raise ConfigError(
            f"parallel.pp = {p.pp} and parallel.ep = {p.ep} need {p.pp * p.ep} processes or more, but there is one: "
            f"add --nproc {p.pp * p.ep}, or start it with torchrun"
        )
    if ranks % p.pp:
        raise ConfigError(f"parallel.pp = {p.pp} does not divide the {ranks} ranks; {_fitting(ranks)} would")
    data = ranks // p.pp
    if data % p.ep:
        what = f"the {data} ranks of a pipeline stage" if p.pp > 1 else f"the {ranks} ranks"
        raise ConfigError(f"parallel.ep = {p.ep} does not divide {what}; {_fitting(data)} would")
    if m.n_routed_experts % p.ep:
        raise ConfigError(
            f"parallel.ep = {p.ep} does not divide the model's {m.n_routed_experts} routed experts; "
            f"{_fitting(m.n_routed_experts)} would"
        )
    if p.ep > 1 and p.ranks_per_node and p.ep > p.ranks_per_node and p.ep % p.ranks_per_node:
        raise ConfigError(
            f"parallel.ep = {p.ep} is more than a node's {p.ranks_per_node} ranks but no multiple of them: "
            "experts are spread over whole nodes"
        )
    if p.zero and p.fsdp:
        raise ConfigError("parallel.zero and parallel.fsdp both shard the moments; set one of them")
    if p.fsdp and p.pp > 1:
        raise ConfigError(
            f"parallel.fsdp gathers a stage's weights for every micro-batch, so it is for pp = 1, not {p.pp}; "
            "use parallel.zero"
        )
    if p.trace and p.pp == 1:
        raise ConfigError("parallel.trace draws the timeline of a pipeline, but parallel.pp = 1; set it to false")
    stages = p.pp * (2 if p.pp > 1 and p.schedule == "dualpipev" else 1)
    if stages > m.num_hidden_layers:
        raise ConfigError(
            f"{p.schedule} cuts the network into {stages} stages for parallel.pp = {p.pp}, but it has "
            f"{m.num_hidden_layers} layers; lower parallel.pp"
        )
    for key, size in (("batch_size", t.batch_size), ("batch_size_start", t.batch_size_start or t.batch_size)):
        if size < data:
            raise ConfigError(
                f"train.{key} = {size} leaves some of the {data} data-parallel ranks without a sequence; "
                f"raise it to {data} or more"
            )
    if p.pp > 1:
        _check_pipeline(run, data)


def _check_pipeline(run: RunConfig, data: int) -> None:
    """A pipeline's micro-batches are of one size, and it needs a number of them."""
    t, p = run.train, run.parallel
    for size in sorted({batch_size(run, step) for step in range(int(t.ramp * t.steps) + 1)}):
        micro = t.micro_batch_size or size // data
        if size % (data * micro):
            raise ConfigError(
                f"a pipeline's micro-batches are of one size, but a step of {size} sequences is no multiple of "
                f"train.micro_batch_size = {t.micro_batch_size} times {data} data-parallel ranks; "
                f"make train.batch_size one{' and leave train.batch_size_start at 0' if t.batch_size_start else ''}"
            )
        schedules.build(p.schedule, p.pp, size // (data * micro))


def _fitting(ranks: int) -> str:
    """The divisors of a number, in words."""
    divisors = [str(d) for d in range(1, ranks + 1) if ranks % d == 0]
    return divisors[0] if len(divisors) == 1 else f"{', '.join(divisors[:-1])} or {divisors[-1]}"


def stages(config: ModelConfig, p: ParallelConfig, rank: int) -> list[Stage]:
    """The stages of a rank of the pipeline, of as equal work as there can be.

    In the V of DualPipeV, rank r holds stages r and 2·pp - 1 - r: the first and the last are on one rank (3.2.2).
    """
    return [Stage(chunk.layers, chunk.first, chunk.last) for chunk in split_layers(config, p.pp, p.schedule)[rank]]
