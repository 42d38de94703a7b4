"""The bytes of a plan are those that the network, the trainer and the allocator have."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from leanseek import ModelConfig, Transformer, native, planning
from leanseek.data.batch import Batch
from leanseek.machine.device import multiplies
from leanseek.model import Stage
from leanseek.planning import schedules
from leanseek.planning.layout import Chunk, Layout, Recipe, held, split_layers
from leanseek.planning.memory import RESERVE, activation_bytes_per_token, in_flight, memory, rank_memory, reach
from leanseek.training.activations import activation_bytes_per_token as measured
from leanseek.training.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from leanseek.training.trainer import Trainer

V3 = ModelConfig.preset("v3-671b")
SMALL = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=6,
    num_attention_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    n_routed_experts=8, num_experts_per_tok=4, n_group=1, topk_group=1, first_k_dense_replace=1,
    max_position_embeddings=256,
)  # fmt: skip
GQA = dataclasses.replace(SMALL, attention="gqa", num_key_value_heads=2)


def run(config: ModelConfig, precision: str, recompute: bool = False, ema: float = 0.0) -> RunConfig:
    train = TrainConfig(dtype="bfloat16", precision=precision, recompute=recompute, device="cpu")
    return RunConfig("x", config, DataConfig(seq_len=128), train, OptimizerConfig(ema=ema))


# ---- parameters ----


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipev"])
@pytest.mark.parametrize(
    ("config", "pp", "ep"),
    [
        (V3, 16, 64),
        (SMALL, 3, 4),
        (SMALL, 1, 2),
        (dataclasses.replace(SMALL, num_nextn_predict_layers=2, q_lora_rank=None), 2, 8),
        (dataclasses.replace(SMALL, tie_word_embeddings=True, num_nextn_predict_layers=0), 2, 1),
        (dataclasses.replace(GQA, n_routed_experts=0), 3, 1),
    ],
    ids=["v3-671b", "small", "one stage", "two MTP modules", "tied", "GQA, dense"],
)
def test_each_rank_holds_what_its_transformer_holds(config: ModelConfig, pp: int, ep: int, schedule: str) -> None:
    ranks = split_layers(config, pp, schedule)
    assert len(ranks) == pp and {len(chunks) for chunks in ranks} == {2 if schedule == "dualpipev" and pp > 1 else 1}
    layers = sorted(layer for chunks in ranks for chunk in chunks for layer in chunk.layers)
    assert layers == list(range(config.num_hidden_layers))
    experts = range(config.n_routed_experts // ep)
    for chunks in ranks:
        stages = [Stage(chunk.layers, chunk.first, chunk.last) for chunk in chunks]
        model = Transformer(config, device="meta", stages=stages, experts=experts if config.n_routed_experts else None)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        has = held(config, chunks)
        assert has.total(ep) == sum(sizes.values())
        assert has.experts // ep == sum(n for name, n in sizes.items() if ".experts." in name)
        assert has.embedding == sizes.get("embed_tokens.weight", 0)
        assert has.head == sizes.get("lm_head.weight", 0)


def test_a_v_gives_the_first_and_the_last_stage_to_rank_0_and_orders_the_layers() -> None:
    ranks = split_layers(V3, 16, "dualpipev")
    assert ranks[0][0].first and ranks[0][1].last
    order = [ranks[r][0] for r in range(16)] + [ranks[r][1] for r in reversed(range(16))]
    assert [layer for chunk in order for layer in chunk.layers] == list(range(61))
    assert all(sum(len(chunk.layers) for chunk in chunks) == 4 for chunks in ranks[1:])  # head and MTP weigh three


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", list(schedules.SCHEDULES))
def test_every_stage_but_the_last_has_a_layer(schedule: str, pp: int) -> None:
    """As many layers as stages are enough for every schedule (distributed/mesh.py asks for that)."""
    stages = pp * (2 if schedule == "dualpipev" and pp > 1 else 1)
    chunks = [
        c for chunks in split_layers(dataclasses.replace(SMALL, num_hidden_layers=stages), pp, schedule) for c in chunks
    ]
    assert all(len(chunk.layers) > 0 or chunk.last for chunk in chunks)
    assert sum(len(chunk.layers) for chunk in chunks) == stages


# ---- state: the trainer's own, and shards that add up ----


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_state_is_the_trainers(precision: str) -> None:
    trainer = Trainer(run(SMALL, precision, ema=0.9))
    tokens = torch.randint(2, 512, (1, 32 + SMALL.lookahead), generator=torch.Generator().manual_seed(0))
    trainer.step(Batch(tokens, 1), 0)
    parts = memory(SMALL, Recipe(seq_len=32, batch_size=1), Layout(precision=precision))
    weights = sum(p.nbytes for p in trainer.model.parameters())
    assert parts["weights"] == parts["gradients"] == weights  # float32, as `.grad` of a parameter is
    state = trainer.state_tensors()
    of = {kind: sum(t.nbytes for name, t in state.items() if name.startswith(kind)) for kind in ("exp_avg", "ema.")}
    assert (parts["moments"], parts["ema"]) == (of["exp_avg"], of["ema."])


@pytest.mark.parametrize("ep", [1, 2, 8])
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_zero_keeps_every_moment_once_and_fsdp_every_weight(pp: int, ep: int) -> None:
    """A rank of each pipeline position, times the ranks at it: nothing is left out, and nothing is counted twice."""
    recipe, total = Recipe(seq_len=128, batch_size=96), planning.parameters(SMALL, mtp=True)
    layout = Layout(pp=pp, dp=8, ep=ep, zero=True, schedule="dualpipev", precision="fp8")
    ranks = [rank_memory(SMALL, recipe, layout, rank) for rank in range(pp)]
    assert 8 * sum(r["moments"] for r in ranks) == pytest.approx(2 * 2 * total, rel=1e-4)
    assert 8 * sum(r["ema"] for r in ranks) == pytest.approx(4 * total, rel=1e-4)
    dense = sum(held(SMALL, chunks).dense for chunks in split_layers(SMALL, pp, "dualpipev"))
    experts = total - dense
    assert 8 * sum(r["weights"] for r in ranks) == 4 * (8 * dense + 8 // ep * experts)
    if pp == 1:
        whole = memory(SMALL, recipe, dataclasses.replace(layout, zero=False, fsdp=True))
        for part, each in {"weights": 4, "gradients": 4, "moments": 4, "ema": 4}.items():
            assert 8 * whole[part] == pytest.approx(each * total, rel=1e-4), part


def test_the_paper_shards_its_masters_and_keeps_its_average_on_the_host() -> None:
    layout = Layout(pp=16, dp=128, ep=64, zero=True, schedule="dualpipev", precision="fp8", recompute=True)
    ours, paper = (rank_memory(V3, Recipe(), layout, 5, paper=p) for p in (False, True))
    assert paper["weights"] == ours["weights"] // 2 and paper["ema"] == 0 == ours["masters"]
    assert paper["masters"] == paper["moments"]  # one of 4 bytes, two of 2
    assert paper["activations"] == ours["activations"]


# ---- activations ----


SHAPES = (
    SMALL,
    dataclasses.replace(SMALL, q_lora_rank=None, num_experts_per_tok=2, n_shared_experts=2),
    dataclasses.replace(SMALL, num_attention_heads=8, n_shared_experts=0, num_nextn_predict_layers=2),
    dataclasses.replace(GQA, num_nextn_predict_layers=0),
)


@pytest.mark.skipif(
    not (native.usable_variants() and multiplies(torch.bfloat16)),
    reason="torch's own operators, and CPUs that widen BF16 for products, keep more than a GPU does",
)
@pytest.mark.parametrize(  # every pair of values
    ("config", "precision", "recompute"),
    [(c, p, bool((i + j) % 2)) for i, c in enumerate(SHAPES) for j, p in enumerate(("bf16", "fp8"))],
)
def test_activations_are_the_allocators(config: ModelConfig, precision: str, recompute: bool) -> None:
    config = dataclasses.replace(config, num_hidden_layers=2)
    tokens = torch.randint(2, 512, (2, 128 + config.lookahead))
    found = measured(Trainer(run(config, precision, recompute)), tokens)
    whole = Chunk(range(2), first=True, last=True)
    assert activation_bytes_per_token(config, whole, precision, recompute) == pytest.approx(found, abs=1)


@pytest.mark.parametrize(("side", "precision"), [("leanseek", "bf16"), ("leanseek fp8", "fp8")])
def test_a_gpus_activations_and_peak(side: str, precision: str) -> None:
    """bench-1b's 32,768 tokens a step, measured on an H200: activations within 1 %; the peak lies below the sum, because
    a step of one micro-batch frees activations while it makes gradients, by at most 15 %."""
    root = Path(__file__).parents[2]
    file = json.loads((root / "benchmarks/results/gpu-check-nvidia-h200.json").read_text(encoding="utf-8"))
    truth = file["parts"]["train bench-1b"]["result"]["results"][side]
    config = ModelConfig.preset("bench-1b")
    whole = Chunk(range(config.num_hidden_layers), first=True, last=True)
    kept = activation_bytes_per_token(config, whole, precision, recompute=False)
    assert kept == pytest.approx(truth["activation_bytes_per_token"], rel=0.01)
    layout = Layout(precision=precision, micro_batch_size=16)
    total = sum(memory(config, Recipe(2048, 16, ema=False), layout).values()) - RESERVE
    assert truth["peak_memory_bytes"] < total < 1.15 * truth["peak_memory_bytes"]


@pytest.mark.parametrize("micro_batches", [16, 40])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("schedule", list(schedules.SCHEDULES))
def test_micro_batches_in_flight_are_the_schedules(schedule: str, ranks: int, micro_batches: int) -> None:
    peaks = schedules.activations(schedules.build(schedule, ranks, micro_batches))
    layout = Layout(pp=ranks, schedule=schedule)
    assert [sum(in_flight(layout, rank, micro_batches)) for rank in range(ranks)] == peaks


# ---- rows of experts ----


@pytest.mark.parametrize("ep", [8, 16, 32, 64, 128, 256])
def test_rows_go_to_at_most_topk_group_nodes(ep: int) -> None:
    """2.1.2: where a group of experts is a node's or more than a node's, at most M = 4 nodes get a token."""
    to = reach(V3, ep, 8)
    assert to.nodes <= min(ep // 8, 4 if ep <= 64 else 8)
    assert to.away == pytest.approx(to.nodes * (1 - 8 / ep))
    assert to.nodes <= to.ranks <= V3.num_experts_per_tok
    anywhere = reach(dataclasses.replace(V3, n_group=1, topk_group=1), ep, 8)
    assert ep < 64 or anywhere.nodes > to.nodes  # 5.3 of 8 nodes without the limit


def test_reach_is_what_random_routes_reach() -> None:
    """Without groups the average is exact: counted over random routes."""
    config = dataclasses.replace(V3, n_group=1, topk_group=1)
    chosen = torch.rand(20_000, 256, generator=torch.Generator().manual_seed(1)).topk(8, dim=1).indices
    for ranks in (8, 32):
        hit = torch.zeros(20_000, ranks).scatter_(1, chosen // (256 // ranks), 1.0).sum(1).mean()
        assert reach(config, ranks, 8).ranks == pytest.approx(float(hit), rel=0.01)
