"""What a request samples is its own on every path: beside neighbours of any parameters, in any order and number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leanseek import LLM, Transformer, checkpoint, native, ops
from leanseek.engine import SamplingParams
from leanseek.machine.device import NARROW
from leanseek.ops import products

FORMS = ["torch", "torch, widened", *native.usable_variants()]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No kernels, with what this CPU multiplies and as if it had no narrow products; then each instruction set."""
    if request.param == "torch, widened":
        monkeypatch.setattr(products, "multiplies", lambda dtype: dtype not in NARROW)
    with ops.use("torch") if request.param.startswith("torch") else native.use_variant(request.param):
        yield request.param


def params(**changes: float) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.5, "seed": 3, "max_tokens": 10} | changes)


MINE = [params(), params(top_k=5), params(top_p=0.9), params(min_p=0.02, top_k=100)]
NEIGHBOURS = [params(top_k=1000, seed=1), params(temperature=0), params(top_p=0.3, seed=2), params(top_k=1, seed=4)]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "fp8"])
def test_sampled_tokens(form: str, stored: str, make_model: Callable[..., Transformer], tmp_path: Path) -> None:
    """A folder as it is stored, from disk to tokens."""
    model = make_model(vocab_size=1500, num_nextn_predict_layers=0, initializer_range=0.1)
    checkpoint.save(
        model.bfloat16() if stored == "bfloat16" else model, tmp_path, "hf-fp8" if stored == "fp8" else "hf"
    )
    llm = LLM(tmp_path, cache_gib=0.001, packed_copy=False, device="cpu")
    prompts = [[5, 6, 7], list(range(9, 50)), [700], [8] * 17]

    def tokens(which: list[int], others: list[SamplingParams]) -> dict[int, list[int]]:
        asked = [prompts[i] for i in which] + [[30 + i, 4] for i in range(len(others))]
        outputs = llm.generate(asked, [MINE[i] for i in which] + others)
        return {i: list(out.outputs[0].token_ids) for i, out in zip(which, outputs, strict=False)}

    alone = dict(itertools.chain.from_iterable(tokens([i], []).items() for i in range(4)))
    assert len({tuple(found) for found in alone.values()}) == 4
    for which, others in (([0], NEIGHBOURS[:1]), ([3, 1], NEIGHBOURS[1:2]), ([2, 0, 3, 1], NEIGHBOURS)):
        assert tokens(which, others) == {i: alone[i] for i in which}
