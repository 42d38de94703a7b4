"""Our calls of DeepEP, by a stand-in that does in plain torch what the library's pages say of `ElasticBuffer`."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanseek import fp8, ops
from leanseek.distributed.deepep import DeepEP
from leanseek.distributed.exchange import Exchange
from leanseek.fp8.recipe import Cast, Tilewise

pytestmark = pytest.mark.distributed


class Event:
    def current_stream_wait(self) -> None: ...


class ElasticBuffer:
    """Everything goes to everybody, who keep what is theirs. Experts are numbered by rank; -1 is another rank's."""

    def __init__(self, group: Any, *, num_max_tokens_per_rank: int, hidden: int, num_topk: int, use_fp8_dispatch: bool):
        self.group, self.tokens, self.fp8 = group, num_max_tokens_per_rank, use_fp8_dispatch
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def get_theoretical_num_sms(self, experts: int, choices: int) -> int:
        return 12

    def _all(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value, group=self.group)
        return found

    def dispatch(
        self, x: Any, *, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None, handle: Any = None,
        num_experts: int = 0, num_max_tokens_per_rank: int = 0, num_sms: int, async_with_compute_stream: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert isinstance(x, tuple) == self.fp8 and (x[0] if self.fp8 else x).is_contiguous()
        indices = weights = None
        if handle is None:
            assert topk_idx is not None and topk_weights is not None and topk_weights.dtype == torch.float32
            assert len(topk_idx) <= self.tokens == num_max_tokens_per_rank
            here, found = num_experts // self.ranks, self._all((topk_idx, topk_weights))
            mine = [(i // here == self.rank).any(1) for i, _ in found]
            indices = torch.cat([i[m] - self.rank * here for (i, _), m in zip(found, mine, strict=True)])
            indices = indices.where((indices >= 0) & (indices < here), -1)
            weights = torch.cat([w[m] for (_, w), m in zip(found, mine, strict=True)]).where(indices >= 0, 0)
            counts = [int((indices == e).sum()) for e in range(here)]
            handle = types.SimpleNamespace(num_recv_tokens_per_expert_list=counts, mine=mine)
        rows = []
        for part in x if self.fp8 else (x,):
            dtype, plain = part.dtype, part.view(torch.uint8) if part.itemsize == 1 else part
            rows.append(torch.cat([p[m] for p, m in zip(self._all(plain), handle.mine, strict=True)]).view(dtype))
        return tuple(rows) if self.fp8 else rows[0], indices, weights, handle, Event()

    def combine(
        self, x: Tensor, *, handle: Any, topk_weights: Tensor | None = None, num_sms: int,
        async_with_compute_stream: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        found = []
        for rows in (x, topk_weights):
            total = None
            for sent, mine in self._all((rows, handle.mine)):
                if sent is not None:
                    whole = torch.zeros(len(mine[self.rank]), sent.shape[1])
                    begin = sum(int(m.sum()) for m in mine[: self.rank])
                    whole[mine[self.rank]] = sent[begin : begin + int(mine[self.rank].sum())].float()
                    total = whole if total is None else total + whole
            found.append(None if total is None or rows is None else total.to(rows.dtype))
        return *found, Event()


def both(rank: int, tiles: bool) -> None:
    module = types.ModuleType("deep_ep")
    module.ElasticBuffer = ElasticBuffer  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module
    generator = torch.Generator().manual_seed(4)
    n, width = (7, 0) if tiles else (5, 12), 144
    x, probe = (torch.randn(sum(n), width, generator=generator).bfloat16() for _ in range(2))
    indices = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(sum(n))])
    weights = torch.rand(sum(n), 3, generator=generator)
    stacks = torch.randn(8, 2 * 24, width, generator=generator) / 12, torch.randn(8, width, 24, generator=generator) / 5
    mine, held, cast = slice(sum(n[:rank]), sum(n[: rank + 1])), slice(rank * 4, rank * 4 + 4), Cast(Tilewise())
    found = []
    for exchange in (Exchange([dist.group.WORLD], 8, tiles), DeepEP(dist.group.WORLD, 8, 20, width, 3, tiles)):
        leaves = [t.clone().requires_grad_() for t in (x[mine], weights[mine], stacks[0][held], stacks[1][held])]
        sending = exchange.dispatch(leaves[0], indices[mine], leaves[1])
        sent = sending.wait()
        rows = fp8.expert_products(sent, *leaves[2:], cast) if tiles else ops.expert_products(sent, *leaves[2:])
        out = sending.combine(rows).wait()
        out.backward(probe[mine])
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tiles", [False, True], ids=["bf16", "fp8"])
def test_the_library_is_called_as_our_exchange_works(run_ranks: Callable[..., list[Any]], tiles: bool) -> None:
    run_ranks(2, both, tiles)
