"""A run is the same run in every layout: losses, counts, biases, weights, moments and averages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from leanseek import save
from leanseek.checkpoint.pieces import Piece
from leanseek.errors import InputError
from leanseek.model import Transformer
from leanseek.model.moe import MoE, Route
from leanseek.training import RunConfig, Trainer
from leanseek.training.config import ParallelConfig
from leanseek.training.origin import first_model
from tests.distributed.runs import (
    FIGURES,
    RUN,
    Found,
    agree,
    alone,
    changed,
    joined,
    part_of,
    same,
    together,
    train,
)  # fmt: skip

pytestmark = pytest.mark.distributed
Run = Callable[..., list[Any]]
TIMEOUT = 600  # seconds: eight ranks on a core or two that others use too
FP8_STEPS = 8  # after the first, distances grow with every choice of an expert that differs


class Layout(NamedTuple):
    ranks: int
    parallel: dict[str, Any]
    train: Mapping[str, Any] = MappingProxyType({})
    layers: int = 4

    def run(self, **settings: Any) -> Any:
        model = {"num_hidden_layers": self.layers}
        return changed(RUN, model=model, parallel=self.parallel, train={**self.train, **settings})


# A growing batch is of 5 sequences first, which two ranks or four share unevenly.
GROWING = {"batch_size_start": 5, "ramp": 0.4}
LAYOUTS = {
    "dp2": Layout(2, {}, GROWING),
    "ep2": Layout(2, {"ep": 2}),
    "ep4": Layout(4, {"ep": 4}, GROWING),
    "ep4 on 2 nodes": Layout(4, {"ep": 4, "ranks_per_node": 2}),
    "pp2": Layout(2, {"pp": 2}),
    "pp2 1f1b": Layout(2, {"pp": 2, "schedule": "1f1b"}, {"recompute": True} | GROWING),
    "pp4": Layout(4, {"pp": 4}, layers=8),
    "pp4 zb1p": Layout(4, {"pp": 4, "schedule": "zb1p"}),
    "dp2 ep2": Layout(4, {"ep": 2}),
    "pp2 ep2": Layout(4, {"pp": 2, "ep": 2}),
    "pp2 dp2": Layout(4, {"pp": 2}),
    "zero": Layout(4, {"zero": True}),
    "zero ep2": Layout(4, {"zero": True, "ep": 2}, GROWING),
    "zero pp2 1f1b": Layout(4, {"zero": True, "pp": 2, "schedule": "1f1b"}),
    "fsdp": Layout(2, {"fsdp": True}, GROWING),
    "fsdp ep2": Layout(4, {"fsdp": True, "ep": 2}),
    "zero pp2 ep2 on 8": Layout(8, {"zero": True, "pp": 2, "ep": 2, "schedule": "zb1p"}),
    "pp4 ep2 on 8": Layout(8, {"pp": 4, "ep": 2, "schedule": "1f1b"}),
}


def layouts(*quick: str) -> list[Any]:
    """Those not named are slow: `make test-dist` runs them too."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in LAYOUTS]


@pytest.mark.parametrize("name", layouts("dp2", "pp2 ep2"))
def test_a_layout_trains_as_one_process_does(run_ranks: Run, name: str) -> None:
    """Megatron#5916: the norm of all gradients, which the steps clip by, is one process's on every mesh. Megatron#7481:
    the counts of a step are still so when later ones have been summed. torchtitan#1304, #1593: tokens count once,
    whatever is accumulated, recomputed or done by several stages."""
    layout = LAYOUTS[name]
    run = layout.run()
    expected = alone(run)
    assert all(step["grad_norm"] > run.optimizer.clip for step in expected.steps)
    agree(together(run_ranks(layout.ranks, train, run, timeout=TIMEOUT)), expected)


# ---- weights of a checkpoint to begin with ----


def begun(rank: int, run: RunConfig, source: str) -> list[Piece]:
    """What this rank holds of the network before the first step, once its modules are those that train."""
    part = part_of(run)
    trainer = Trainer(run, first_model(source, run.train.seed, run.model, part), part)
    return [piece._replace(tensor=piece.tensor.clone()) for piece in part.pieces(trainer.model)]


@pytest.mark.parametrize("name", layouts("pp2 ep2"))
def test_every_rank_begins_with_its_pieces_of_a_checkpoint(run_ranks: Run, name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    run = layout.run()
    source = Transformer(run.model).init_weights(7)
    for buffer_name, buffer in source.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.uniform_()
    save(source, tmp_path / "source")
    ranks = run_ranks(layout.ranks, begun, run, str(tmp_path / "source"), timeout=120)
    found, expected = joined([piece for pieces in ranks for piece in pieces]), source.state_dict()
    assert same(found, dict(expected))


def test_all_ranks_name_the_checkpoint_that_one_cannot_read(run_ranks: Run, tmp_path: Path) -> None:
    run = LAYOUTS["dp2"].run()
    save(Transformer(run.model).init_weights(7), tmp_path / "source")
    (tmp_path / "source/model.safetensors").unlink()
    lines = run_ranks(2, refused, run, str(tmp_path / "source"))
    assert lines[0] == lines[1] and "has neither model.safetensors nor" in lines[0]


def refused(rank: int, run: RunConfig, source: str) -> str:
    with pytest.raises(InputError) as caught:
        first_model(source, 0, run.model, part_of(run))
    return str(caught.value)


# ---- FP8 ----
# A sum in another order may round a value up instead of down, and a gate then chooses another expert: after that two
# runs differ by far more than 1e-6. So the distance of a layout is held against that of one process from itself.


def apart(found: Found, expected: Found) -> tuple[dict[str, float], dict[str, float]]:
    """How far two runs are apart in their first step, and in all: figures relative to themselves, choices of experts
    to all of them, weights to their norm."""
    pairs = list(zip(found.steps, expected.steps, strict=True))
    first, whole = (
        {key: max(abs(a[key] / b[key] - 1) for a, b in some) for key in FIGURES} for some in (pairs[:1], pairs)
    )
    for far, some in ((first, pairs[:1]), (whole, pairs)):
        moved = [(a["counts"][layer] - load).abs().sum() for a, b in some for layer, load in b["counts"].items()]
        far["counts"] = int(sum(moved)) / sum(int(load.sum()) for _, b in some for load in b["counts"].values())
    whole["loss"] = max(whole["loss"], abs(found.evaluation / expected.evaluation - 1))
    norms = [(float((found.weights[n] - w).norm()), float(w.norm())) for n, w in expected.weights.items()]
    whole["weights"] = math.hypot(*(d for d, _ in norms)) / math.hypot(*(w for _, w in norms))
    return first, whole


@contextlib.contextmanager
def sums_in(parts: int) -> Iterator[None]:
    """The sum of a token's experts in parts, each rounded to BF16, as if they came from that many ranks."""

    def forward(self: MoE, x: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Route]:
        flat = x.reshape(-1, x.shape[-1])
        route = self.gate(flat, replay)
        part = route.indices // (route.scores.shape[1] // parts)
        each = [self.experts(flat, route._replace(weights=route.weights * (part == i))) for i in range(parts)]
        return (torch.stack(each).float().sum(0).to(x.dtype) + self.shared_experts(flat)).view(x.shape), route

    with mock.patch.object(MoE, "forward", forward):
        yield


@functools.cache
def in_parts(run: RunConfig, parts: int) -> Found:
    """The run in one process with such sums."""
    with sums_in(parts):
        return together([train(0, run, single=True, steps=FP8_STEPS)])


@functools.cache
def reordered(run: RunConfig) -> list[dict[str, float]]:
    """How far one process is from itself, in its first step and in all, where tiles hold other tokens or sums are in
    parts: the largest distances."""
    others = [alone(changed(run, train={"micro_batch_size": 4}), FP8_STEPS), in_parts(run, 2), in_parts(run, 4)]
    pairs = zip(*(apart(other, alone(run, FP8_STEPS)) for other in others), strict=True)
    return [{key: max(far[key] for far in some) for key in some[0]} for some in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_in_fp8_is_as_near_as_one_process_in_another_order(run_ranks: Run, name: str) -> None:
    """The first step's losses and choices are those of one process that rounds sums as the ranks of the experts do, to
    1e-6; then all is within three times of the largest of three distances of one process from itself."""
    layout = LAYOUTS[name]
    run = layout.run(precision="fp8", dtype="bfloat16", batch_size_start=0, recompute=False)
    found = together(run_ranks(layout.ranks, train, run, steps=FP8_STEPS, timeout=TIMEOUT))
    plain = dataclasses.replace(run, parallel=ParallelConfig())
    expected, ep = alone(plain, FP8_STEPS), run.parallel.ep
    first, _ = apart(found, expected if ep == 1 else in_parts(plain, ep))
    norm = first.pop("grad_norm")
    assert max(first.values()) < 1e-6 and first["counts"] == 0, first
    assert ep > 1 or norm < 1e-6
    for far, most in zip(apart(found, expected), reordered(plain), strict=True):
        assert all(far[key] <= 3 * most[key] + 1e-6 for key in far), (far, most)
    assert found.weights.keys() == expected.weights.keys() and found.state.keys() == expected.state.keys()
