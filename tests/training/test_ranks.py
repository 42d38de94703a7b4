"""Two processes that meet in `Part` alone train as one process does with the whole batch."""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from leanseek import ModelConfig
from leanseek.data.batch import Batch
from leanseek.model.moe import Gate
from leanseek.training import RunConfig, Trainer
from leanseek.training.config import BalanceConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from leanseek.training.part import Norms, Part, Slice
from tests.small import NETWORK, forked

MODEL = ModelConfig(**NETWORK | {"vocab_size": 67, "n_routed_experts": 8, "initializer_range": 0.1})
RUN = RunConfig(
    name="ranks",
    model=MODEL,
    train=TrainConfig(steps=100, batch_size=5, micro_batch_size=2, dtype="float32", device="cpu"),
    optimizer=OptimizerConfig(lr=1e-3),
    schedule=ScheduleConfig(warmup_steps=0),
    balance=BalanceConfig(bias_update_speed=0.01, sequence_alpha=0.1),
)
STEPS, BATCH, SPOILT = 40, 5, (2, 36)
SPIKE = 38


class Summed(Part):
    """Plain data parallelism: each rank has all weights and some of the sequences."""

    def reduce(self, slices: dict[str, Slice], sums: Tensor, counts: Tensor) -> Norms:
        for tensor in (*(s.parameter.grad for s in slices.values()), sums, counts):
            dist.all_reduce(tensor)
        return super().reduce(slices, sums, counts)


def run(rows: slice, spoils: bool, part: Part | None = None) -> tuple[list[dict], dict[str, Tensor]]:
    """Each step's results and the last weights. Train on `rows` of each batch; who `spoils` makes a gradient NaN, or the loss huge, in some steps."""
    trainer = Trainer(RUN, part=part)
    gates = [m for m in trainer.model.modules() if isinstance(m, Gate)]
    weight, found = trainer.model.layers[1].self_attn.o_proj.weight, []
    for step in range(STEPS):
        batch = torch.randint(0, 67, (BATCH, 14), generator=torch.Generator().manual_seed(step))
        hooks = []
        if spoils and step in SPOILT:
            hooks.append(weight.register_hook(lambda g: g * float("nan")))
        if spoils and step == SPIKE:
            hooks.append(trainer.model.lm_head.register_forward_hook(lambda module, inputs, loss: loss * 50))
        result = trainer.step(Batch(batch[rows], BATCH), step)
        for hook in hooks:
            hook.remove()
        found.append(
            {
                "figures": [result.loss, result.mtp_loss, result.balance_loss, result.grad_norm],
                "applied": result.applied,
                "counts": {str(layer): c.tolist() for layer, c in result.counts.items()},
                "biases": [g.e_score_correction_bias.tolist() for g in gates],
            }
        )
    return found, {n: p.detach() for n, p in trainer.model.named_parameters()}


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    """Losses and norms to rounding; counts, biases and skipped steps exactly; both ranks the same to the bit.

    One rank alone has the NaN or the spike, which both then leave out. The parts are of 3 and 2 sequences.
    """
    ranks = [forked(lambda rank=rank: _rank(tmp_path, rank)) for rank in range(2)]
    try:
        alone, weights = run(slice(0, BATCH), True)
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    text, other = ((tmp_path / f"{rank}.json").read_text() for rank in range(2))
    assert text == other
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(w, second[name]) for name, w in first.items())
    assert [i for i, step in enumerate(alone) if not step["applied"]] == [*SPOILT, SPIKE]
    for i, (here, there) in enumerate(zip(alone, json.loads(text), strict=True)):
        figures = here.pop("figures"), there.pop("figures")
        if i != SPIKE:  # alone, all of the batch is in it
            assert figures[1] == pytest.approx(figures[0], rel=1e-4, nan_ok=True)
        assert there == here
    for name, weight in weights.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def _rank(folder: Path, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    found, weights = run(slice(0, 3) if rank == 0 else slice(3, BATCH), rank == 1, Summed())
    (folder / f"{rank}.json").write_text(json.dumps(found))
    save_file(weights, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()
