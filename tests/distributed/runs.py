"""Small runs in any layout, and what their ranks hold in the end put together."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from leanseek import ModelConfig
from leanseek.checkpoint.pieces import Piece
from leanseek.data.batch import Batch
from leanseek.distributed.mesh import build_mesh
from leanseek.distributed.ranks import RankPart
from leanseek.training import RunConfig, Trainer
from leanseek.training.config import (
    BalanceConfig,
    DataConfig,
    MTPConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from leanseek.training.part import Part
from leanseek.training.schedules import batch_size

STEPS, LENGTH = 20, 10
FIGURES = ("loss", "mtp_loss", "balance_loss", "grad_norm")
MODEL = ModelConfig(
    vocab_size=67, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1,
    num_nextn_predict_layers=1, initializer_range=0.1,
)  # fmt: skip
RUN = RunConfig(
    name="layouts",
    model=MODEL,
    data=DataConfig(seq_len=LENGTH),
    train=TrainConfig(steps=STEPS, batch_size=8, micro_batch_size=1, dtype="float32", device="cpu"),
    optimizer=OptimizerConfig(lr=1e-3, ema=0.9),
    schedule=ScheduleConfig(warmup_steps=4),
    balance=BalanceConfig(bias_update_speed=0.01, sequence_alpha=0.1),
    mtp=MTPConfig(weight=0.3),
)


def changed(run: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The run with other values in some of its sections."""
    return dataclasses.replace(
        run, **{name: dataclasses.replace(getattr(run, name), **values) for name, values in sections.items()}
    )


def part_of(run: RunConfig) -> Part:
    """This rank's."""
    return RankPart(run, build_mesh(run, "cpu"), "cpu")


def share_of(trainer: Trainer, tokens: Tensor) -> Batch:
    """This rank's sequences of a batch."""
    own = trainer.part.share(len(tokens))
    return Batch(tokens, len(tokens)).rows(own.start, own.stop)


def batch(run: RunConfig, step: int) -> Tensor:
    """Tokens [B, T + lookahead] of a step."""
    shape = batch_size(run, step), run.data.seq_len + run.model.lookahead
    return torch.randint(0, run.model.vocab_size, shape, generator=torch.Generator().manual_seed(step))


class Found(NamedTuple):
    """What a rank says of a run, or what all say together."""

    steps: list[dict[str, Any]]  # StepResults
    evaluation: float  # loss of a batch after the last step
    weights: dict[str, Tensor] | list[Piece]
    state: dict[str, Tensor] | list[Piece]  # moments and EMA


def train(rank: int, run: RunConfig, single: bool = False, steps: int = STEPS) -> Found:
    """What this rank does of a run; `single`: all of it."""
    part = Part() if single else part_of(run)
    trainer, found = Trainer(run, part=part), []
    for step in range(steps):
        tokens = batch(run, step)
        found.append(trainer.step(share_of(trainer, tokens), step)._asdict())
    return Found(found, evaluate(trainer), part.pieces(trainer.model), trainer.pieces()[1])


def evaluate(trainer: Trainer) -> float:
    """The main loss of a batch that no step has, of all ranks."""
    tokens = batch(trainer.run, trainer.run.train.steps)
    sums = torch.tensor(trainer.evaluate(share_of(trainer, tokens)), dtype=torch.float64)
    total = trainer.part.total(sums)
    return float(total[0] / total[2])


def alone(run: RunConfig, steps: int = STEPS) -> Found:
    """The run in one process."""
    return _alone(dataclasses.replace(run, parallel=ParallelConfig()), steps)


@functools.cache
def _alone(run: RunConfig, steps: int) -> Found:
    return together([train(0, run, single=True, steps=steps)])


def together(ranks: list[Found]) -> Found:
    """What all ranks say, which is the same: each step's result, and where several hold a weight, its bits."""
    first, *others = ranks
    for other in others:
        assert same(other.steps, first.steps) and other.evaluation == first.evaluation
    weights, state = ([piece for rank in ranks for piece in getattr(rank, kind)] for kind in ("weights", "state"))
    return Found(first.steps, first.evaluation, joined(weights), joined(state))


def same(found: Any, expected: Any) -> bool:
    """Whether two structures are equal to the bit, NaN included."""
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected or (found != found and expected != expected))


def joined(pieces: list[Piece]) -> dict[str, Tensor]:
    """Whole tensors from the ranges of them that ranks hold. What several hold is the same on all."""
    whole: dict[str, Tensor] = {}
    there: dict[str, Tensor] = {}
    for name, shape, start, tensor in pieces:
        values = tensor.detach().flatten()
        whole.setdefault(name, torch.empty(shape, dtype=tensor.dtype))
        seen = there.setdefault(name, torch.zeros(shape, dtype=torch.bool)).view(-1)[start : start + len(values)]
        into = whole[name].view(-1)[start : start + len(values)]
        assert torch.equal(into[seen], values[seen]), f"ranks differ in {name}"
        into.copy_(values)
        seen.fill_(True)
    assert all(seen.all() for seen in there.values())
    return whole


def agree(found: Found, expected: Found) -> None:
    """Counts and biases are equal, losses and norms within 1e-6 of themselves, weights within 1e-5, and moments and
    averages within 1e-5 of their norms."""
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        for key in FIGURES:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
        assert same(ours["counts"], theirs["counts"])
    assert found.evaluation == pytest.approx(expected.evaluation, rel=1e-6)
    assert found.weights.keys() == expected.weights.keys() and found.state.keys() == expected.state.keys()
    for name, weight in expected.weights.items():
        limit = 0 if name.endswith("bias") else 1e-5
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=limit, msg=lambda t, n=name: f"{n}: {t}")
    for name, value in expected.state.items():
        assert (found.state[name] - value).norm() <= 1e-5 * value.norm(), name
