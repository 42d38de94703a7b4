"""What went wrong in other trainers, each in the layout in which it did; more of them stand beside what they are about
(test_experts.py, test_exchange.py, test_pipeline.py, test_layouts.py, checkpoint/test_sharded.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leanseek.checkpoint.hf import load_pieces
from leanseek.checkpoint.pieces import Piece
from leanseek.checkpoint.training import newest_checkpoint
from leanseek.checkpoint.writer import Writer
from leanseek.config import ConfigError
from leanseek.distributed.mesh import check_layout
from leanseek.model.moe import Gate
from leanseek.training import RunConfig, Trainer
from leanseek.training.part import Part
from tests.distributed.runs import (
    LENGTH,
    RUN,
    Found,
    agree,
    alone,
    batch,
    changed,
    evaluate,
    joined,
    part_of,
    same,
    share_of,
    together,
    train,
)  # fmt: skip

pytestmark = pytest.mark.distributed
Run = Callable[..., list[Any]]


# ---- clipping ----


def test_a_stage_without_experts_clips_torchtitan_1541(run_ranks: Run) -> None:
    """Its ranks have no gradient in the groups of the experts. Moments show by what gradients were multiplied."""
    run = changed(
        RUN,
        model={"first_k_dense_replace": 2},
        parallel={"pp": 2, "ep": 2, "schedule": "1f1b"},
        optimizer={"clip": 0.1},
    )
    agree(together(run_ranks(4, train, run, steps=2)), alone(run, steps=2))


@pytest.mark.parametrize(("pp", "schedule"), [(2, "1f1b"), (2, "dualpipev"), (4, "zb1p")])
def test_every_split_into_stages_clips_by_the_same_bits_torchtitan_4312(run_ranks: Run, pp: int, schedule: str) -> None:
    """But with MTP: there two stages add to the embedding's gradient, in another order."""
    run = changed(RUN, model={"num_nextn_predict_layers": 0})
    expected = alone(run, steps=3)
    found = together(run_ranks(pp, train, changed(run, parallel={"pp": pp, "schedule": schedule}), steps=3))
    norms = [[step["grad_norm"] for step in one.steps] for one in (found, expected)]
    assert norms[0] == norms[1] and min(norms[0]) > run.optimizer.clip
    assert same(found.weights, expected.weights) and same(found.state, expected.state)


# ---- experts ----


def starved(rank: int, run: RunConfig, single: bool = False) -> tuple[Found, dict[str, Tensor] | list[Piece]]:
    """A step, and two in which only the first four experts are chosen. Also the moments after the first."""
    trainer = Trainer(run, part=None if single else part_of(run))
    steps = [trainer.step(share_of(trainer, batch(run, 0)), 0)._asdict()]
    before = [piece._replace(tensor=piece.tensor.clone()) for piece in trainer.pieces()[1]]
    for module in trainer.model.modules():
        if isinstance(module, Gate):
            module.e_score_correction_bias.copy_(torch.where(torch.arange(8) < 4, 10.0, -10.0))
    steps += [trainer.step(share_of(trainer, batch(run, i)), i)._asdict() for i in (1, 2)]
    return Found(steps, evaluate(trainer), trainer.part.pieces(trainer.model), trainer.pieces()[1]), before


def test_a_rank_whose_experts_get_no_token_automodel_2995_3680(run_ranks: Run) -> None:
    """It takes part in every exchange, its gradients are zeros, and its moments decay as one process's do."""
    run = changed(RUN, parallel={"ep": 2})
    ranks = run_ranks(2, starved, run)
    found, expected = together([one for one, _ in ranks]), together([starved(0, run, single=True)[0]])
    agree(found, expected)
    before = joined([piece for _, pieces in ranks for piece in pieces])
    stacks = [name for name in before if ".experts." in name]
    for name in stacks:
        kind, beta = name.partition(".")[0], {"exp_avg": 0.9, "exp_avg_sq": 0.95}
        if kind in beta:
            torch.testing.assert_close(found.state[name][4:], before[name][4:] * beta[kind] ** 2)
            assert before[name][4:].abs().max() > 0
        elif kind == "step":
            assert found.state[name] == 3
    assert len(stacks) == 4 * 2 * 4  # three layers and the MTP module's; step, moments and average


def gradients(rank: int, run: RunConfig, single: bool = False) -> list[Piece]:
    """What of the first step's gradient the balance loss makes: with it, less without it."""
    found: list[dict[str, Piece]] = []
    for alpha in (10.0, 0.0):
        here = changed(run, balance={"sequence_alpha": alpha}, optimizer={"clip": 1e9})
        trainer, own = Trainer(here, part=None if single else part_of(here)), dict[str, Piece]()

        def keep(*_: Any, trainer: Trainer = trainer, own: dict[str, Piece] = own) -> None:
            slices = trainer.slices.items()
            own |= {n: Piece(n, s.shape, s.start, s.parameter.grad.clone()) for n, s in slices}

        trainer.optimizer.register_step_pre_hook(keep)
        trainer.step(share_of(trainer, batch(here, 0)), 0)
        found.append(own)
    with_it, without = found
    return [piece._replace(tensor=piece.tensor - without[name].tensor) for name, piece in with_it.items()]


@pytest.mark.parametrize(
    ("ranks", "parallel", "micro"),
    [(1, {}, 1), (1, {}, 2), (2, {}, 2), (2, {"ep": 2}, 0), (2, {"pp": 2, "schedule": "1f1b"}, 2),
     (4, {"zero": True, "ep": 2}, 1)],
)  # fmt: skip
def test_the_balance_gradient_is_that_of_the_whole_batch_megatron_1652_5047(
    run_ranks: Run, ranks: int, parallel: dict[str, Any], micro: int
) -> None:
    """It grew with the micro-batches and with the ranks of a group."""
    expected = joined(gradients(0, changed(RUN, train={"micro_batch_size": 0}), single=True))
    run = changed(RUN, parallel=parallel, train={"micro_batch_size": micro})
    parts = run_ranks(ranks, gradients, run) if ranks > 1 else [gradients(0, run, single=True)]
    found = joined([piece for part in parts for piece in part])
    assert found.keys() == expected.keys()
    for layer in (1, 2, 3):
        name = f"layers.{layer}.mlp.gate.weight"
        assert (found[name] - expected[name]).norm() < 1e-4 * expected[name].norm()
    off = math.hypot(*(float((found[name] - g).norm()) for name, g in expected.items()))
    assert off < 1e-4 * math.hypot(*(float(g.norm()) for g in expected.values()))


@pytest.mark.parametrize("recompute", [False, True])
def test_tokens_count_once_megatron_7481_torchtitan_1304_1593(run_ranks: Run, recompute: bool) -> None:
    """Counts were summed in place again and again, and counted at every accumulation, recomputation and inference of
    shapes. Each step's are looked at after the last."""
    run = changed(RUN, parallel={"pp": 2}, train={"recompute": recompute})
    found = together(run_ranks(4, train, run, steps=3))
    for step in found.steps:
        assert sorted(step["counts"]) == [1, 2, 3, 4]
        assert {int(load.sum()) for load in step["counts"].values()} == {8 * LENGTH * run.model.num_experts_per_tok}
    agree(found, alone(changed(RUN, train={"recompute": recompute}), steps=3))


# ---- the embedding of the first stage and of the last ----


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipev"])
def test_a_shared_embedding_under_zero_megatron_844(run_ranks: Run, schedule: str) -> None:
    """Its gradient was reduced over one stage's ranks before the other's was added. `together` checks that copies are
    the same bits."""
    run = changed(RUN, model={"tie_word_embeddings": True})
    parallel = {"pp": 2, "zero": True, "schedule": schedule}
    agree(together(run_ranks(4, train, changed(run, parallel=parallel), steps=3)), alone(run, steps=3))


# ---- checkpoints ----


def leg(rank: int, run: RunConfig, folder: Path, begin: int, end: int, single: bool = False) -> Found:
    """Steps `begin` to `end` of a run whose checkpoints are in the folder; it ends with one."""
    part = Part() if single else part_of(run)
    if begin:
        found, _ = newest_checkpoint(folder, part)
        assert found is not None and found.step == begin
        model = part.model(run.model)
        load_pieces(found.folder, part.pieces(model))
        trainer = Trainer(run, model, part)
        trainer.load_state_tensors(found.tensors, found.state["without_moments"])
    else:
        trainer = Trainer(run, part=part)
    steps = [trainer.step(share_of(trainer, batch(run, i)), i)._asdict() for i in range(begin, end)]
    pieces, values = trainer.pieces(), {"without_moments": trainer.without_moments()}
    with Writer(folder, 9, ranks=part) as writer:
        writer.save(end, run.model, *pieces, values, folder.parent)
    return Found(steps, evaluate(trainer), part.pieces(trainer.model), pieces[1])


PARALLEL = {
    "one": (1, {}),
    "ep2": (2, {"ep": 2}),
    "ep4": (4, {"ep": 4}),
    "pp2": (2, {"pp": 2, "schedule": "1f1b"}),
    "pp4": (4, {"pp": 4, "schedule": "zb1p"}),
    "zero": (4, {"zero": True}),
    "zero pp2": (4, {"zero": True, "pp": 2}),
    "fsdp ep2": (4, {"fsdp": True, "ep": 2}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run, beside a tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path / "run"


def legs(run_ranks: Run, run: RunConfig, folder: Path, *layouts: str) -> list[Found]:
    """A run of two steps in each layout."""
    found = []
    for number, layout in enumerate(layouts):
        ranks, parallel = PARALLEL[layout]
        here, way = changed(run, parallel=parallel), (folder, 2 * number, 2 * number + 2)
        parts = run_ranks(ranks, leg, here, *way) if ranks > 1 else [leg(0, here, *way, single=True)]
        found.append(together(parts))
    return found


@pytest.mark.parametrize(
    "layouts",
    [
        ("pp4", "ep4"),
        pytest.param(("ep2", "one", "ep4"), marks=pytest.mark.slow),
        pytest.param(("zero", "fsdp ep2", "zero pp2"), marks=pytest.mark.slow),
        pytest.param(("zero pp2", "one", "pp4"), marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_another_layout_goes_on_pytorch_120356_megatron_1517(
    run_ranks: Run, layouts: tuple[str, ...], folder: Path
) -> None:
    """With the weights, moments and average of one process."""
    found = legs(run_ranks, RUN, folder, *layouts)
    steps = [step for one in found for step in one.steps]
    agree(found[-1]._replace(steps=steps), alone(RUN, steps=2 * len(layouts)))


@pytest.mark.parametrize(
    "layout", ["pp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero pp2", "fsdp ep2"))]
)
def test_the_loss_does_not_jump_at_resume_megatron_bridge_5380(run_ranks: Run, layout: str, folder: Path) -> None:
    """The last stage's copy of the embedding, which MTP reads, had other weights after it: now the same layout goes on
    to the bit."""
    ranks, parallel = PARALLEL[layout]
    through = together(run_ranks(ranks, train, changed(RUN, parallel=parallel), steps=4))
    first, second = legs(run_ranks, RUN, folder, layout, layout)
    assert same(first.steps + second.steps, through.steps)
    assert same(second.weights, through.weights) and same(second.state, through.state)


@pytest.mark.slow
def test_a_rank_without_a_row_saves_and_loads_pytorch_163480(run_ranks: Run, folder: Path) -> None:
    """Four ranks share the two rows of a gate of two experts."""
    few = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    run = changed(RUN, model=few, parallel={"fsdp": True})
    parts = run_ranks(4, leg, run, folder, 0, 2)
    sizes = [p.tensor.numel() for one in parts for p in one.weights if p.name == "layers.1.mlp.gate.weight"]
    assert sorted(sizes) == [0, 0, 32, 32]
    second = together(run_ranks(4, leg, run, folder, 2, 4))
    agree(
        second._replace(steps=together(parts).steps + second.steps),
        alone(changed(run, parallel={"fsdp": False}), steps=4),
    )


# ---- what is refused, what is skipped, what it costs ----


def test_fewer_micro_batches_than_a_schedule_needs_torchtitan_775() -> None:
    """It is refused before anything is read."""
    run = changed(RUN, model={"num_hidden_layers": 8}, parallel={"pp": 4}, train={"batch_size": 6})
    with pytest.raises(ConfigError, match="dualpipev on 4 ranks needs at least 8 micro-batches, not 6"):
        check_layout(run, 4)
    check_layout(changed(run, train={"batch_size": 8}), 4)
    with pytest.raises(ConfigError, match="dualpipev on 2 ranks needs at least 4 micro-batches, not 2"):
        check_layout(changed(RUN, parallel={"pp": 2}, train={"batch_size": 16, "micro_batch_size": 4}), 4)


def spoilt(rank: int, run: RunConfig, culprit: int) -> tuple[list[dict[str, Any]], list[str], bool]:
    """Three steps that go wrong on one rank: NaN in a gradient, NaN in an output, a huge loss; what had changed?"""
    trainer, found, held = Trainer(run, part=part_of(run)), [], rank == culprit
    trainer.guard.load_state({"losses": [4.0 + i % 3 / 10 for i in range(40)], "in_a_row": 0})
    layer, found = trainer.model.layers[3] if held else None, []
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    for step in range(3):
        hooks = []
        if layer and step == 0:
            hooks.append(layer.self_attn.o_proj.weight.register_hook(lambda g: g * math.nan))
        if layer and step == 1:
            hooks.append(layer.mlp.register_forward_hook(lambda m, i, out: (out[0] * math.nan, out[1])))
        if layer and step == 2:
            hooks.append(trainer.model.lm_head.register_forward_hook(lambda m, i, loss: loss * 50))
        found.append(trainer.step(share_of(trainer, batch(run, step)), step)._asdict())
        for hook in hooks:
            hook.remove()
    unchanged = same(trainer.model.state_dict(), before)
    found.append(trainer.step(share_of(trainer, batch(run, 3)), 3)._asdict())
    return found, list(trainer.state_tensors()), unchanged


def test_all_ranks_skip_what_one_had_and_name_it(run_ranks: Run) -> None:
    run = changed(RUN, parallel={"pp": 2, "schedule": "1f1b"}, train={"micro_batch_size": 2})
    parts = run_ranks(4, spoilt, run, 3)
    steps = parts[0][0]
    assert all(same(other, steps) for other, _, _ in parts)
    assert [step["applied"] for step in steps] == [False, False, False, True]
    gradient, output, spike, _ = (step["reason"] for step in steps)
    assert gradient.startswith("gradient of layers.3.self_attn.o_proj.weight on rank 3 is not finite (shape [32, 16]")
    assert output.startswith("output of layers.3.mlp on rank 3 is not finite")
    assert "deviations above 4.1, the median of the last 40; the largest gradient is the gradient of " in spike
    assert "rank 3 has the largest loss" in spike
    assert all(unchanged for _, _, unchanged in parts)
    for step in steps[2:]:
        assert {int(load.sum()) for load in step["counts"].values()} == {8 * LENGTH * 3}


def optimizer_bytes(rank: int, run: RunConfig, single: bool = False) -> int:
    trainer = Trainer(run, part=None if single else part_of(run))
    trainer.step(share_of(trainer, batch(run, 0)), 0)
    return sum(t.nbytes for t in trainer.state_tensors().values())


@pytest.mark.parametrize(
    "parallel", [{"zero": True}, {"zero": True, "ep": 2}, pytest.param({"fsdp": True}, marks=pytest.mark.slow)], ids=str
)
def test_four_ranks_share_the_optimizers_memory(run_ranks: Run, parallel: dict[str, Any]) -> None:
    """Moments and average: at most 0.3 of one process's on each."""
    whole = optimizer_bytes(0, RUN, single=True)
    found = run_ranks(4, optimizer_bytes, changed(RUN, parallel=parallel))
    assert max(found) <= 0.3 * whole and sum(found) >= whole


# ---- evaluation between steps ----


def norms(rank: int, run: RunConfig, evaluated: bool) -> list[float]:
    trainer, found = Trainer(run, part=part_of(run)), []
    for step in range(3):
        found.append(trainer.step(share_of(trainer, batch(run, step)), step).grad_norm)
        if evaluated:
            evaluate(trainer)
    return found


@pytest.mark.parametrize("layout", [{"fsdp": True}, {"pp": 2, "schedule": "1f1b"}], ids=str)
def test_an_evaluation_changes_no_gradient_of_the_next_step(run_ranks: Run, layout: dict[str, Any]) -> None:
    """FSDP2 keeps what a forward without a backward has gathered, and the next step's gradient lacked a part."""
    run = changed(RUN, parallel=layout)
    assert run_ranks(2, norms, run, True) == run_ranks(2, norms, run, False)
