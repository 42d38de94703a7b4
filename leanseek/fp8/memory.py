"""What a step keeps for backward: computing it again instead of keeping it, and measuring what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Maker:
    """Computes a tensor again, once for all its views that wait for it."""

    def __init__(self, make: Callable[[], Tensor]):
        self.make, self.waiting, self.made = make, 0, None

    made: Tensor | None

    def take(self) -> Tensor:
        if (made := self.made) is None:
            with torch.no_grad():
                made = self.make()
        self.waiting -= 1
        self.made = made if self.waiting > 0 else None
        return made


class _Recipe(NamedTuple):
    """In place of a kept tensor: what makes the one that it is a view of, and which view."""

    maker: _Maker
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class Recomputed(saved_tensors_hooks):
    """Inside this context, autograd recomputes the given tensors in backward instead of saving them (3.2.3).

    Each pair is a tensor and a function that computes it again, bit for bit and without gradients. The function may
    hold only what is kept anyway. Tensors that are not views of these are saved as usual.
    """

    def __init__(self, *pairs: tuple[Tensor, Callable[[], Tensor]]):
        makers = {tensor.untyped_storage().data_ptr(): _Maker(make) for tensor, make in pairs}

        def pack(t: Tensor) -> Tensor | _Recipe:
            maker = makers.get(t.untyped_storage().data_ptr())
            if maker is None:
                return t
            maker.waiting += 1
            return _Recipe(maker, t.size(), t.stride(), t.storage_offset())

        def unpack(kept: Tensor | _Recipe) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            return kept.maker.take().as_strided(kept.size, kept.stride, kept.offset)

        super().__init__(pack, unpack)


def live_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """Bytes that a forward leaves allocated while its result is held: what autograd keeps, in whatever form.

    Counted by the allocator, so nothing hides: neither what hooks put elsewhere nor what a closure holds.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        held = forward()
        left = torch.cuda.memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            held = forward()
        left = sum(event.self_cpu_memory_usage for event in found.key_averages())
    del held
    return left
