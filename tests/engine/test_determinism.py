"""At temperature 0 nothing but the request decides its logits: the same bits in any company and cache state."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from leanseek import Transformer, native, ops
from leanseek.engine import SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=12, logprobs=5)


@pytest.fixture(scope="module")
def crowd() -> dict[str, list[int]]:
    """Six prompts of 1 to 100 tokens, two with a common beginning."""
    generator = torch.Generator().manual_seed(9)
    lengths = (1, 5, 17, 33, 100)
    found = {f"r{n}": torch.randint(2, 320, (n,), generator=generator).tolist() for n in lengths}
    found["shared"] = [*found["r100"][:80], 3, 4, 5]
    return found


@pytest.fixture(params=["torch", "native"] if native.usable_variants() else ["torch"])
def backend(request: pytest.FixtureRequest):
    """The ops in plain torch, and the native kernels where they are built."""
    with ops.use(request.param):
        yield


@pytest.mark.parametrize("kind", ["model", "drafting_model"])
def test_logits_are_the_same_bits_whatever_the_settings(
    kind: str,
    backend: None,
    request: pytest.FixtureRequest,
    make_engine: Callable,
    answers: Callable,
    crowd: dict[str, list[int]],
) -> None:
    """Alone, together, staggered, in chunks, with pages scarce, with any number of drafts: exactly equal logprobs."""
    model: Transformer = request.getfixturevalue(kind)
    alone = {
        name: answers(make_engine(model, speculate=0, prefix_cache=False), {name: prompt}, PARAMS)[name]
        for name, prompt in crowd.items()
    }
    cache_gib = request.getfixturevalue("cache_gib")
    settings: list[tuple[dict[str, Any], int]] = [
        ({"speculate": 0}, 0),
        ({"speculate": 1}, 1),
        ({"speculate": 0, "step_tokens": 7}, 2),
        ({"speculate": 3, "step_tokens": 50, "page_size": 8}, 0),
        ({"speculate": 2, "page_size": 4, "cache_gib": cache_gib(116)}, 0),
    ]
    for options, stagger in settings:
        engine = make_engine(model, **options)
        together = answers(engine, crowd, PARAMS, stagger)
        for name in crowd:
            assert together[name] == alone[name], (options, name)
        if "cache_gib" in options:
            assert engine.stats().preemptions > 0
        again = answers(engine, crowd, PARAMS)  # now from the prefix cache
        assert engine.stats().cached_tokens > 0
        assert again == together


def test_logits_are_the_same_bits_with_two_threads(
    drafting_model: Transformer, make_engine: Callable, answers: Callable, crowd: dict[str, list[int]]
) -> None:
    few = {name: crowd[name] for name in ("r5", "r33", "shared")}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = {
            name: answers(make_engine(drafting_model, speculate=0), {name: few[name]}, PARAMS)[name] for name in few
        }
        assert answers(make_engine(drafting_model, speculate=2, step_tokens=20), few, PARAMS) == alone
    finally:
        torch.set_num_threads(before)


def test_sampled_tokens_depend_on_the_seed_alone(
    drafting_model: Transformer, make_engine: Callable, crowd: dict[str, list[int]], serve: Callable
) -> None:
    """Seeded sampling, too, is the same alone and in company, with and without drafts."""
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=11, max_tokens=16)
    prompts = list(crowd.values())
    alone = [serve(make_engine(drafting_model, speculate=0), [prompt], params)[0] for prompt in prompts]
    for options in ({"speculate": 0}, {"speculate": 1}, {"speculate": 3, "step_tokens": 30}):
        assert serve(make_engine(drafting_model, **options), prompts, params) == alone
    other = SamplingParams(temperature=1.0, top_p=0.95, seed=12, max_tokens=16)
    assert serve(make_engine(drafting_model), prompts, other) != alone
