"""A run is the same run in every layout: losses, counts, biases, weights, moments and averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.distributed.runs import FIGURES, RUN, Found, agree, alone, changed, together, train

pytestmark = pytest.mark.distributed
Run = Callable[..., list[Any]]


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


def apart(found: Found, expected: Found, steps: int | None = None) -> dict[str, float]:
    """How far two runs are apart in their first steps, or in the end: figures and the evaluation relative to
    themselves, the counts to all tokens', all weights to their norm."""
    pairs = list(zip(found.steps, expected.steps, strict=True))[:steps]
    far = {key: max(abs(a[key] / b[key] - 1) for a, b in pairs) for key in FIGURES}
    moved = sum(int((a["counts"][layer] - load).abs().sum()) for a, b in pairs for layer, load in b["counts"].items())
    far["counts"] = moved / sum(int(load.sum()) for _, b in pairs for load in b["counts"].values())
    if steps is None:
        far["evaluation"] = abs(found.evaluation / expected.evaluation - 1)
        norms = [(float((found.weights[n] - w).norm()), float(w.norm())) for n, w in expected.weights.items()]
        far["weights"] = math.hypot(*(d for d, _ in norms)) / math.hypot(*(w for _, w in norms))
    return far


@pytest.mark.parametrize("name", layouts("dp2", "ep2", "pp2", "pp2 ep2", "fsdp"))
def test_a_layout_trains_as_one_process_does(run_ranks: Run, name: str) -> None:
    """Megatron#5916: the norm of all gradients, which the steps clip by, is one process's on every mesh. Megatron#7481:
    the counts of a step are still so when later ones have been summed. torchtitan#1304, #1593: tokens count once,
    whatever is accumulated, recomputed or done by several stages."""
    layout = LAYOUTS[name]
    run = layout.run()
    expected = alone(run)
    assert all(step["grad_norm"] > run.optimizer.clip for step in expected.steps)
    agree(together(run_ranks(layout.ranks, train, run, timeout=200)), expected)
