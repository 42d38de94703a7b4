"""What a plan says of experts that are spread over ranks is what ranks keep and send."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanseek import ModelConfig, fp8, native
from leanseek.distributed import experts
from leanseek.machine.device import multiplies
from leanseek.model import Transformer
from leanseek.planning.layout import Chunk
from leanseek.planning.memory import BF16, WIRE, activation_bytes_per_token, reach

pytestmark = pytest.mark.distributed
CONFIG = ModelConfig(
    vocab_size=512, hidden_size=512, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, first_k_dense_replace=1,
    num_nextn_predict_layers=0, max_position_embeddings=256,
)  # fmt: skip
TOKENS = 192


@functools.cache
def groups(nodes: int) -> list[dist.ProcessGroup]:
    ranks = torch.arange(dist.get_world_size()).view(nodes, -1)
    if nodes == 1:
        return [dist.group.WORLD]
    return [dist.new_subgroups_by_enumeration(t.tolist())[0] for t in (ranks.t(), ranks)]


def even_routes(tokens: int, rank: int) -> torch.Tensor:
    """[tokens, K]: K of the experts of two random groups each."""
    generator = torch.Generator().manual_seed(rank)
    group = torch.rand(tokens, CONFIG.n_group, generator=generator).topk(CONFIG.topk_group).indices
    size = CONFIG.n_routed_experts // CONFIG.n_group
    open_to = (group[:, :, None] * size + torch.arange(size)).flatten(1)
    return open_to.gather(1, torch.rand(open_to.shape, generator=generator).topk(CONFIG.num_experts_per_tok).indices)


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of all tensors that a forward saves for backward."""
    found: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = forward()
    del out
    return sum(t.untyped_storage().nbytes() for t in found.values())


def on_a_rank(rank: int, nodes: int, precision: str) -> tuple[float, list[float]]:
    """Bytes a token that a forward saves, and that each hop sends to other ranks in a forward, there and back."""
    share = CONFIG.n_routed_experts // dist.get_world_size()
    model = Transformer(CONFIG, experts=range(rank * share, (rank + 1) * share)).init_weights(3)
    fp8.apply(model, precision)
    experts.apply(model, groups(nodes), fp8=precision == "fp8")
    tokens = torch.randint(2, 512, (3, TOKENS + 1), generator=torch.Generator().manual_seed(rank))
    routes = even_routes(3 * TOKENS, rank)

    def forward(sequences: int) -> object:
        part, replay = tokens[:sequences], dict.fromkeys((1, 2), routes[: sequences * TOKENS])
        return model(part[:, :-1], part[:, 1:], dtype=torch.bfloat16, replay=replay)

    one, three = (saved_bytes(lambda n=n: forward(n)) for n in (1, 3))  # type: ignore[misc]
    hops = list(zip(*(m.exchange.hops for m in model.modules() if isinstance(m, experts.MoE)), strict=True))
    before = [sum(peers.sent_bytes for peers in hop) for hop in hops]
    forward(3)
    sent = [(sum(peers.sent_bytes for peers in hop) - b) / (3 * TOKENS) for b, hop in zip(before, hops, strict=True)]
    return (three - one) / (2 * TOKENS), sent


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_rows_sent_and_kept(run_ranks: Callable[..., list[Any]], nodes: int, precision: str) -> None:
    """4 ranks, all in a node or two in each: half of the groups, so half of the ranks, have an expert of a token."""
    found = run_ranks(4, on_a_rank, nodes, precision)
    saved, sent = (sum(f[0] for f in found) / 4, [sum(hop) / 4 for hop in zip(*(f[1] for f in found), strict=True)])
    to = reach(CONFIG, 4, 4 // nodes)
    row = 2 * CONFIG.hidden_size * ((WIRE if precision == "fp8" else BF16) + BF16)  # of two MoE layers, there and back
    away = [to.ranks * 3 / 4] if nodes == 1 else [to.away, to.ranks / 2]
    assert sent == pytest.approx([rows * row for rows in away], rel=0.05)
    # as in test_memory.py; and FP8 recomputes by hooks of its own, which these cannot see
    if precision == "bf16" and native.usable_variants() and multiplies(torch.bfloat16):
        whole = Chunk(range(CONFIG.num_hidden_layers), first=True, last=True)
        print(
            nodes, [f[0] for f in found], saved, activation_bytes_per_token(CONFIG, whole, precision, False, to.ranks)
        )
        assert saved == pytest.approx(activation_bytes_per_token(CONFIG, whole, precision, False, to.ranks), rel=0.02)
