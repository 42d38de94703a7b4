"""A network whose experts are spread over ranks is the network of one process."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leanseek import ModelConfig, fp8
from leanseek.distributed import experts
from leanseek.distributed.exchange import Exchange
from leanseek.model import Transformer, load_counts
from leanseek.training.objective import losses

pytestmark = pytest.mark.distributed
Run = Callable[..., list[Any]]
CONFIG = ModelConfig(
    vocab_size=67, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1,
    num_nextn_predict_layers=1, initializer_range=0.2,
)  # fmt: skip
BATCH = torch.randint(0, 67, (6, 14), generator=torch.Generator().manual_seed(1))
ROWS = {1: [6], 2: [2, 4], 4: [1, 2, 1, 2]}  # sequences of each rank
MAIN, ALL = {}, {"mtp_weight": 0.3, "sequence_alpha": 0.1}


@functools.cache
def groups(nodes: int) -> list[dist.ProcessGroup]:
    ranks = torch.arange(dist.get_world_size()).view(nodes, -1)
    if nodes == 1:
        return [dist.group.WORLD]
    return [dist.new_subgroups_by_enumeration(t.tolist())[0] for t in (ranks.t(), ranks)]


def network(ranks: int, rank: int, nodes: int, precision: str) -> Transformer:
    share = CONFIG.n_routed_experts // ranks
    model = Transformer(CONFIG, experts=range(rank * share, (rank + 1) * share)).init_weights(3)
    fp8.apply(model, precision)
    if ranks > 1:
        experts.apply(model, Exchange(groups(nodes), CONFIG.n_routed_experts, fp8=precision == "fp8"))
    return model


def step(
    ranks: int, rank: int, nodes: int, weights: dict[str, float], precision: str = "bf16",
    dtype: torch.dtype = torch.float32, recompute: bool = False, replay: dict[int, Tensor] | None = None,
) -> tuple[list[float], dict[str, Tensor], dict[int, Tensor], dict[int, Tensor]]:  # fmt: skip
    """Losses, gradients, counts and choices of this rank's part of the batch."""
    model, rows = network(ranks, rank, nodes, precision), ROWS[ranks]
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    part = BATCH[mine]
    if replay is not None:
        here = {layer: chosen.unflatten(0, (len(BATCH), -1))[mine].flatten(0, 1) for layer, chosen in replay.items()}
        model.forward = functools.partial(model.forward, replay=here)  # type: ignore[method-assign]
    found = losses(model, part, share=len(part) / len(BATCH), dtype=dtype, recompute=recompute, **weights)
    found.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    figures = [float(t.detach()) for t in (found.main, found.mtp, found.balance)]
    counts, choices = ({r.layer: of(r) for r in found.routes} for of in (load_counts, lambda r: r.indices))
    return figures, gradients, counts, choices


def on_a_rank(rank: int, *arguments: Any, **options: Any) -> tuple[Any, ...]:
    return step(dist.get_world_size(), rank, *arguments, **options)


def joined(parts: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """All ranks' as one process has them: sums, but experts and choices one rank's after another's."""
    figures = [sum(values) for values in zip(*(p[0] for p in parts), strict=True)]
    assert len({tuple(p[1]) for p in parts}) == 1  # a gradient is None on all ranks or on none
    gradients = {
        name: torch.cat([p[1][name] for p in parts]) if ".experts." in name else sum(p[1][name] for p in parts)
        for name in parts[0][1]
    }
    counts = {layer: sum(p[2][layer] for p in parts) for layer in parts[0][2]}
    choices = {layer: torch.cat([p[3][layer] for p in parts]) for layer in parts[0][3]}
    return figures, gradients, counts, choices


def equal(found: tuple[Any, ...], expected: tuple[Any, ...], tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        limit = tolerance * float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=limit, msg=lambda t, n=name: f"{n}: {t}")
    for kind in (2, 3):
        assert all(torch.equal(found[kind][layer], tensor) for layer, tensor in expected[kind].items())


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("weights", [ALL, MAIN], ids=["all losses", "main loss"])
def test_losses_gradients_and_counts_are_one_process(
    run_ranks: Run, ranks: int, nodes: int, weights: dict[str, float]
) -> None:
    """pytorch#160285: EP1 and EP2 give equal expert gradients. Automodel#2995: the main loss alone reaches the gate."""
    expected = step(1, 0, 1, weights)
    equal(joined(run_ranks(ranks, on_a_rank, nodes, weights)), expected, 5e-6)
    assert all(expected[1][f"layers.{layer}.mlp.gate.weight"].abs().max() > 1e-4 for layer in (1, 2))


def test_recompute_counts_once_and_changes_nothing(run_ranks: Run) -> None:
    """torchtitan#1304, #1593: tokens were counted again when activations were computed again."""
    equal(joined(run_ranks(2, on_a_rank, 1, ALL, recompute=True)), step(1, 0, 1, ALL), 5e-6)


def checkpointed(rank: int) -> tuple[Tensor, Tensor, list[int]]:
    """A layer whose forward runs again in backward, its exchanges included."""
    model = network(2, rank, 1, "bf16")
    layer, x = model.layers[1].mlp, torch.randn(10, 32, requires_grad=True)
    out, route = checkpoint(layer, x, use_reentrant=False)
    out.square().sum().backward()
    found = x.grad.clone(), layer.experts.down_proj.grad.clone()
    model.zero_grad()
    x.grad = None
    plain, _ = layer(x)
    plain.square().sum().backward()
    assert torch.equal(found[0], x.grad) and torch.equal(found[1], layer.experts.down_proj.grad)
    return load_counts(route)


def test_a_layer_whose_exchange_runs_again_in_backward(run_ranks: Run) -> None:
    assert [int(counts.sum()) for counts in run_ranks(2, checkpointed)] == [30, 30]


@pytest.mark.parametrize("ranks", [1, 2])
def test_recorded_routes_are_replayed(run_ranks: Run, ranks: int) -> None:
    """A step recorded on one process or on two repeats on two, whatever the gate would choose now."""
    expected = step(1, 0, 1, ALL)
    recorded = expected[3] if ranks == 1 else joined(run_ranks(2, on_a_rank, 1, ALL))[3]
    other = {layer: (chosen + 1) % 8 for layer, chosen in recorded.items()}
    equal(joined(run_ranks(2, on_a_rank, 1, ALL, replay=recorded)), expected, 5e-6)
    moved = joined(run_ranks(2, on_a_rank, 1, ALL, replay=other))
    equal(moved, step(1, 0, 1, ALL, replay=other), 5e-6)
    assert all(torch.equal(moved[3][layer], chosen) for layer, chosen in other.items())


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance of all gradients, each relative to its norm."""
    return math.hypot(*(float((found[name] - g).norm() / g.norm()) for name, g in expected.items()))


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_low_precision_is_one_process_to_its_rounding(run_ranks: Run, ranks: int, nodes: int, precision: str) -> None:
    """A rank's sum is rounded to BF16 on its way, and FP8 tiles of dense layers hold this rank's tokens: gradients are
    nearer to one process's than these are to float32's."""
    exact = step(1, 0, 1, ALL)
    options = {"dtype": torch.bfloat16, "replay": exact[3]}
    expected = step(1, 0, 1, ALL, precision, **options)
    found = joined(run_ranks(ranks, on_a_rank, nodes, ALL, precision, **options))
    assert found[0] == pytest.approx(expected[0], rel=2e-2 if precision == "fp8" else 4e-3)
    assert apart(found[1], expected[1]) < apart(expected[1], exact[1])
