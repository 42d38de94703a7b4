"""Gradients summed over the ranks that hold the same weights, and the two ways to hold less on each: ZeRO-1 (3.2.3: a
flat reduce-scatter, AdamW on each rank's share of the elements, a flat all-gather) and torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from leanseek import fp8
from leanseek.distributed.collectives import all_gather, reduce_scatter
from leanseek.distributed.watch import phase
from leanseek.model import Transformer
from leanseek.model.moe import Experts
from leanseek.training.part import Slice

BUCKET = 1 << 23  # elements of a flat exchange, 32 MB: large enough for bandwidth, small beside the gradients


class Held(NamedTuple):
    """A parameter of this rank."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]  # of the network's tensor, of which it is a range
    start: int  # the range's first element
    first: bool  # as in Slice


class Bucket:
    """Parameters whose gradients are exchanged as one flat tensor over `group`.

    With `zero` each rank of the group updates an equal share of the elements, and the parameters become views of one
    flat tensor, which an all-gather fills.
    """

    def __init__(self, held: list[Held], group: dist.ProcessGroup, zero: bool):
        self.held, self.group = held, group
        self.sizes = [h.parameter.numel() for h in held]
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.share = -(-sum(self.sizes) // self.ranks)  # elements; the last rank's may end in padding
        self.flat: Tensor | None = None  # the weights, with `zero`
        self.pieces: list[tuple[str, Slice]] = [(h.name, Slice(*h[1:])) for h in held]
        if zero:
            self.flat = held[0].parameter.detach().new_zeros(self.share * self.ranks)
            self.pieces = list(self._move(self.flat))

    def _own(self, flat: Tensor) -> Tensor:
        return flat[self.rank * self.share : (self.rank + 1) * self.share]

    def _move(self, flat: Tensor) -> Iterator[tuple[str, Slice]]:
        """Make the parameters views of `flat`; what this rank's share holds of each."""
        begin, at = self.rank * self.share, 0
        for (name, parameter, shape, start, first), size in zip(self.held, self.sizes, strict=True):
            parameter.data = flat[at : at + size].view(parameter.shape).copy_(parameter.detach())
            low, high = max(at, begin), min(at + size, begin + self.share)
            if low < high:
                yield name, Slice(nn.Parameter(flat[low:high]), shape, start + low - at, first)
            at += size

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients into those of the pieces; the parameters' own are let go of.

        What nothing differentiated has no gradient afterwards either.
        """
        absent = {h.name for h in self.held if h.parameter.grad is None}
        flat = self.held[0].parameter.new_zeros(sum(self.sizes) if self.flat is None else self.flat.numel())
        parts = flat.split([*self.sizes, flat.numel() - sum(self.sizes)])
        for part, held in zip(parts, self.held, strict=False):
            if held.parameter.grad is not None:
                part.copy_(held.parameter.grad.flatten())
                held.parameter.grad = None
        with phase("the sum of gradients"):
            if self.flat is None:
                own = flat
                dist.all_reduce(own, group=self.group)
            else:
                own = flat.new_empty(self.share)
                reduce_scatter(own, flat, group=self.group)
        sizes = [piece.parameter.numel() for _, piece in self.pieces]
        for (name, (parameter, *_)), gradient in zip(
            self.pieces, own.split([*sizes, len(own) - sum(sizes)]), strict=False
        ):
            parameter.grad = None if name in absent else gradient.view(parameter.shape)

    @torch.no_grad()
    def gather(self) -> None:
        """Each rank's share of the updated weights to all."""
        if self.flat is not None:
            with phase("the gathering of weights"):
                all_gather(self.flat, self._own(self.flat).clone(), group=self.group)
            torch.autograd.graph.increment_version([h.parameter for h in self.held])  # FP8 keeps casts of them


class FullySharded:
    """Weights of which each rank holds a range of rows, gathered by FSDP2 where a module's forward or backward begins.

    `data` shards the dense weights, `replicas` the experts; FSDP2 reduces in backward, here as a plain sum.
    """

    def __init__(self, model: Transformer, data: DeviceMesh, replicas: DeviceMesh):
        self.model = model
        for module in model.modules():
            if isinstance(module, Experts) and replicas != data:
                fully_shard(module, mesh=replicas)
                register_fsdp_forward_method(module, "products")
        head = [] if model.lm_head is None else [model.lm_head]
        for module in (*model.layers, *model.mtp, *head, model):
            fully_shard(module, mesh=data)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # the optimizer moves the shards' own memory
        self.shards = {name: nn.Parameter(local(p.detach())) for name, p in model.named_parameters()}

    def reduce(self) -> None:
        """Backward has summed the gradients."""
        for name, parameter in self.model.named_parameters():
            self.shards[name].grad = None if parameter.grad is None else local(parameter.grad)

    def release(self) -> None:
        """Let go of what a forward without a backward has gathered: the next backward would miss its gradients."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gather(self) -> None:
        """The next forward does it; FP8 keeps casts of what it gathered."""
        fp8.forget(self.model)


def local(tensor: Tensor) -> Tensor:
    """This rank's values."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The first row of a tensor that this rank has."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    return min(-(-tensor.shape[0] // mesh.size()) * mesh.get_local_rank(), tensor.shape[0])


def buckets(held: list[Held], group: dist.ProcessGroup, zero: bool) -> Iterator[Bucket]:
    """The parameters in their order, in exchanges of `BUCKET` elements or one larger parameter."""
    some: list[Held] = []
    for one in held:
        if some and sum(h.parameter.numel() for h in some) + one.parameter.numel() > BUCKET:
            yield Bucket(some, group, zero)
            some = []
        some.append(one)
    if some:
        yield Bucket(some, group, zero)
