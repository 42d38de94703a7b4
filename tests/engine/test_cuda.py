"""The engine on a GPU: the CPU's greedy tokens, and the same bits whatever a request shares its steps with."""

from collections.abc import Callable

import pytest
import torch

from leanseek import Transformer
from leanseek.engine import Engine, Guide, SamplingParams, Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=3)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def on_gpu(request: pytest.FixtureRequest, drafting_model: Transformer) -> Transformer:
    return copied(drafting_model, "cuda", getattr(torch, request.param))


def copied(model: Transformer, device: str, dtype: torch.dtype) -> Transformer:
    copy = Transformer(model.config, device, dtype)
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False)


@pytest.fixture
def answered(answers: Callable) -> Callable:
    """answered(engine, prompts, params, stagger=0): the answer of each prompt."""

    def run(engine: Engine, prompts: list[list[int]], params: SamplingParams = GREEDY, stagger: int = 0) -> list:
        return list(answers(engine, {str(i): prompt for i, prompt in enumerate(prompts)}, params, stagger).values())

    return run


def test_greedy_tokens_are_the_cpus(
    make_engine: Callable, answered: Callable, make_model: Callable, prompts: list[list[int]]
) -> None:
    """In float32, where the best token leads by more than rounding; drafts and chunks change nothing."""
    model = make_model(seed=3)
    on_cpu = answered(make_engine(model, speculate=0), prompts)
    for options in ({"speculate": 0}, {"speculate": 2}, {"speculate": 0, "step_tokens": 9}):
        found = answered(make_engine(copied(model, "cuda", torch.float32), **options), prompts)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in on_cpu], options
        for (_, ours), (_, theirs) in zip(found, on_cpu, strict=True):
            assert [p for p, _ in ours] == pytest.approx([p for p, _ in theirs], abs=2e-3)


@pytest.mark.parametrize(
    ("options", "stagger"),
    [({"speculate": 0}, 0), ({"speculate": 0}, 1), ({"speculate": 1}, 2), ({"speculate": 3, "step_tokens": 50}, 0),
     ({"speculate": 0, "step_tokens": 7, "page_size": 4}, 1)],
)  # fmt: skip
def test_logits_are_the_same_bits_in_any_company(
    on_gpu: Transformer,
    make_engine: Callable,
    answered: Callable,
    prompts: list[list[int]],
    options: dict,
    stagger: int,
) -> None:
    alone = [answered(make_engine(on_gpu, speculate=0), [prompt])[0] for prompt in prompts]
    engine = make_engine(on_gpu, **options)
    assert answered(engine, prompts, stagger=stagger) == alone
    assert answered(engine, prompts) == alone  # now from the prefix cache


def test_sampled_tokens_depend_on_the_seed_alone(
    on_gpu: Transformer, make_engine: Callable, answered: Callable, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=11, max_tokens=16)
    alone = [answered(make_engine(on_gpu, speculate=0), [prompt], params)[0] for prompt in prompts]
    for options in ({"speculate": 0}, {"speculate": 2, "step_tokens": 30}):
        assert answered(make_engine(on_gpu, **options), prompts, params) == alone


def test_penalties_biases_and_guides_run(
    on_gpu: Transformer, make_engine: Callable, answered: Callable, tokenizer: Tokenizer
) -> None:
    engine = make_engine(on_gpu, tokenizer, eos_token_ids=[0])
    params = SamplingParams(
        temperature=0.7, repetition_penalty=1.2, frequency_penalty=0.3, min_p=0.01, logit_bias={7: 2.0}, seed=1,
        max_tokens=12, prompt_logprobs=2, guided=Guide.choice(["fox", "dog"]),
    )  # fmt: skip
    ((tokens, _),) = answered(engine, [[5, 6, 7, 8]], params)
    assert tokenizer.decode(tokens, True) in ("fox", "dog")
