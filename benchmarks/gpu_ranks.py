"""The code of several ranks on one GPU: a group of one rank on NCCL, a pipeline of one, and what overlaps.

    torchrun --standalone --nproc-per-node 1 benchmarks/gpu_ranks.py OUT.json

Measured is one MoE layer behind its exchange, with the shared expert beside the rows under way and after them, and with
streams that wait for each other. One GPU says nothing of links: rows go from its memory to its memory.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from leanseek.config import ModelConfig
from leanseek.distributed import experts, join
from leanseek.distributed.exchange import Exchange
from leanseek.model import Transformer
from leanseek.training import RunConfig, Trainer
from leanseek.training.pace import random_batch


def main(out: Path) -> None:
    report: dict[str, Any] = {"benchmark": "gpu-ranks", "torch": torch.__version__}
    table = {
        "name": "ranks",
        "model": ModelConfig.preset("bench-30m").to_dict(),
        "train": {"batch_size": 8, "micro_batch_size": 2, "steps": 100},
        "data": {"seq_len": 512 if torch.cuda.is_available() else 16},
    }
    run = RunConfig.from_dict(table)
    found: dict[str, list[float]] = {}
    alone = Trainer(run)
    report["device"] = torch.cuda.get_device_name() if alone.device.type == "cuda" else "cpu"
    found["one process"] = [alone.step(random_batch(run), step).loss for step in range(4)]
    del alone
    with join(run) as part:
        for name, precision, zero in (("bf16", "bf16", False), ("bf16, zero", "bf16", True), ("fp8", "fp8", False)):
            changed = RunConfig.from_dict(
                table | {"train": table["train"] | {"precision": precision}, "parallel": {"zero": zero}}  # type: ignore[operator]
            )
            part.run = changed  # type: ignore[attr-defined]
            trainer = Trainer(changed, part=part)
            exchange = Exchange(part.mesh.hops, run.model.n_routed_experts, fp8=precision == "fp8")  # type: ignore[attr-defined]
            experts.apply(trainer.model, exchange)
            found[f"one rank, {name}"] = [trainer.step(random_batch(run), step).loss for step in range(4)]
            del trainer
        report["losses"] = found
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        report["moe_seconds"] = _moe()
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _moe() -> dict[str, float]:
    """Seconds of a MoE layer of bench-1b on 16,384 tokens: forward, its parts, and with the two in turn."""
    cuda = torch.cuda.is_available()
    config = ModelConfig.preset("bench-1b" if cuda else "bench-30m")
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    model = Transformer(config, device, dtype).init_weights(0)
    layer = next(block.mlp for block in model.layers if isinstance(block.mlp, experts.moe.MoE))
    group = dist.new_group([0])
    experts.apply(layer, Exchange([group], config.n_routed_experts))
    x = torch.randn(1, 16384 if cuda else 64, config.hidden_size, device=device, dtype=dtype)

    def in_turn() -> None:
        route = layer.gate(x[0])
        sending = layer.exchange.dispatch(x[0], route.indices, route.weights)
        back = sending.combine(layer.experts.products(sending.wait())).wait()
        if cuda:
            torch.cuda.synchronize()
        torch.add(back, layer.shared_experts(x[0]))

    def shared() -> None:
        layer.shared_experts(x[0])

    def exchange() -> None:
        route = layer.gate(x[0])
        sending = layer.exchange.dispatch(x[0], route.indices, route.weights)
        sending.wait()

    with torch.no_grad():
        return {
            "shared expert beside the exchange": _seconds(lambda: layer(x)),
            "one after the other": _seconds(in_turn),
            "shared expert alone": _seconds(shared),
            "dispatch alone": _seconds(exchange),
        }


def _seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(15 if torch.cuda.is_available() else 4):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
