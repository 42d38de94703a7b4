"""What the protocol promises backends of the engine: they may reuse what they handed out, and add rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from leanseek import LLM, SamplingParams, Transformer, native, ops
from leanseek.backends import StepBackend, TorchBackend, backend_of
from leanseek.engine import Engine

PROMPTS = [[5, 6, 7], list(range(9, 60)), [11]]
PARAMS = [
    SamplingParams(max_tokens=9, temperature=0, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_tokens=12, seed=1, top_p=0.9),
    SamplingParams(max_tokens=5, seed=2, repetition_penalty=1.2),
]


class Reusing:
    """Spoils what a method handed out when it is called again, as a replayed CUDA graph does."""

    def __init__(self, inner: StepBackend):
        self._inner = inner
        self.config, self.device, self.dtype = inner.config, inner.device, inner.dtype
        self._last: dict[str, Tensor] = {}

    def _fresh(self, method: str, result: Tensor) -> Tensor:
        if (last := self._last.get(method)) is not None:
            last.fill_(torch.nan)
        self._last[method] = result
        return result

    def step(self, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        return self._fresh("step", self._inner.step(tokens, cache, index))

    def step_ahead(self, depth: int, hidden: Tensor, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        return self._fresh("step_ahead", self._inner.step_ahead(depth, hidden, tokens, cache, index))

    def logits(self, hidden: Tensor) -> Tensor:
        return self._fresh("logits", self._inner.logits(hidden))


class Padding(Reusing):
    """Pads a step to a fixed number of rows with copies of its last one, each a sequence of its own."""

    def step(self, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        more = -len(tokens) % 16
        padded = ops.CacheIndex(
            *(_repeated(t, more) for t in (index.positions, index.slots)),
            torch.cat((index.row_offsets, index.row_offsets[-1] + 1 + torch.arange(more))),
            _repeated(index.lengths, more), _repeated(index.pages, more), index.page_size,
        )  # fmt: skip
        return super().step(_repeated(tokens, more), cache, padded)[: len(tokens)]


def _repeated(x: Tensor, more: int) -> Tensor:
    return torch.cat((x, x[-1:].expand(more, *x.shape[1:])))


@pytest.fixture(params=["torch", *native.usable_variants()])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    with ops.use("torch") if request.param == "torch" else native.use_variant(request.param):
        yield


def said(backend: StepBackend, speculate: int) -> list[Any]:
    llm = LLM(Engine(backend, cache_gib=0.001, speculate=speculate, seed=0))
    outputs = llm.generate(PROMPTS, PARAMS)
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("wrapper", [Reusing, Padding])
def test_the_engine_asks_no_more(wrapper: Callable, speculate: int, tiny_model: Callable[..., Transformer]) -> None:
    model = tiny_model(num_nextn_predict_layers=1).requires_grad_(False)
    expected = said(backend_of(model), speculate)
    assert said(wrapper(backend_of(model)), speculate) == expected


@pytest.mark.usefixtures("path")
@torch.no_grad()
def test_a_step_of_no_rows(tiny_model: Callable[..., Transformer]) -> None:
    """As a rank without requests would take part in others' steps."""
    model = tiny_model(num_nextn_predict_layers=1).requires_grad_(False)
    for backend in (backend_of(model), TorchBackend(model)):
        c, none = model.config, torch.zeros(0, dtype=torch.int64)
        cache = torch.randn(c.num_hidden_layers + 1, 16, c.cache_width)
        before = cache.clone()
        index = ops.CacheIndex(none, none, torch.zeros(1, dtype=torch.int64), none, none.view(0, 1), 4)
        hidden = backend.step(none, cache, index)
        assert backend.step_ahead(1, hidden, none, cache, index).shape == hidden.shape == (0, c.hidden_size)
        assert backend.logits(hidden).shape == (0, c.vocab_size)
        assert torch.equal(cache, before)
