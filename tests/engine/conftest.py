"""Small models for the engine's tests: decisive random ones, one whose MTP module drafts well, and a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanseek import ModelConfig, Transformer
from leanseek.backends import backend_of
from leanseek.engine import Engine, Request, SamplingParams, Tokenizer
from leanseek.ops import sampling
from tests.small import GROUPED, pair_tokenizer

VOCAB = 320

CONFIG: dict[str, Any] = GROUPED | {
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # decisive: the best token leads by far more than rounding
    "eos_token_id": None,
}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """make_model(seed=0, **config changes): random weights."""

    def make(seed: int = 0, **changes: Any) -> Transformer:
        config = ModelConfig(**CONFIG | changes)
        return Transformer(config).init_weights(seed).requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Transformer]) -> Transformer:
    return make_model()


@pytest.fixture(scope="session")
def drafting_model(make_model: Callable[..., Transformer]) -> Transformer:
    """Nearly a bigram model, whose MTP module knows the same bigrams: most drafts are right, not all.

    The blocks add little to the embedding, and eh_proj passes the next token's embedding through.
    """
    model = make_model(seed=3, initializer_range=0.5)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            weight.mul_(0.004 if name.startswith("layers.") else 0.0)
    width = model.config.hidden_size
    model.mtp[0].eh_proj.weight.copy_(torch.cat((torch.eye(width), torch.zeros(width, width)), dim=1))
    return model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE of VOCAB ids with an end token (0) and a special one."""
    text = "the quick brown fox jumps over the lazy dog, naïvely: 你好 🙂 " * 3
    inner = pair_tokenizer(text, VOCAB, ["<end>", "<tool>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    inner.save(str(folder / "tokenizer.json"))
    return Tokenizer(Path(folder))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Five prompts of 1 to 90 tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in (3, 40, 17, 90, 1)]


@pytest.fixture(scope="session")
def cache_gib() -> Callable[[int], float]:
    """cache_gib(tokens): the budget that holds that many tokens of a CONFIG model with its MTP module."""
    per_token = (CONFIG["kv_lora_rank"] + CONFIG["qk_rope_head_dim"]) * 4 * (CONFIG["num_hidden_layers"] + 1)
    return lambda tokens: tokens * per_token / 2**30


@pytest.fixture(scope="session")
def make_engine(cache_gib: Callable[[int], float]) -> Callable[..., Engine]:
    """make_engine(model, **options) with a cache of 3,000 tokens, so that checking the books is quick."""
    return lambda model, tokenizer=None, **options: Engine(
        backend_of(model), tokenizer, **{"cache_gib": cache_gib(3000), "seed": 0} | options
    )


@pytest.fixture(scope="session")
def serve() -> Callable[..., list[list[int]]]:
    """serve(engine, prompts, params): tokens of each prompt's choices in turn, checking the books after every step."""

    def run(engine: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
        each = params if isinstance(params, list) else [params] * len(prompts)
        tokens: dict[tuple[str, int], list[int]] = {}
        for i, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            engine.add(Request(str(i), prompt, own))
            tokens |= {(str(i), choice): [] for choice in range(own.n)}
        while engine.has_work():
            for delta in engine.step():
                assert delta.error is None, delta.error
                tokens[delta.request_id, delta.index] += delta.token_ids
            engine.check_invariants()
        return list(tokens.values())

    return run


@pytest.fixture
def in_crowds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's form samples rows one by one, for the sake of their bits; a distribution does not ask for that."""
    monkeypatch.setattr(sampling, "CPU_ROWS", 1000)


Answer = tuple[list[int], list[tuple[float, list[tuple[int, float]]]]]


@pytest.fixture(scope="session")
def answers() -> Callable[..., dict[str, Answer]]:
    """answers(engine, prompts by name, params, stagger=0): tokens and exact logprobs of each request.

    With `stagger`, a request arrives every so many steps.
    """

    def run(
        engine: Engine, prompts: dict[str, list[int]], params: SamplingParams, stagger: int = 0
    ) -> dict[str, Answer]:
        found: dict[str, Answer] = {name: ([], []) for name in prompts}
        waiting = [Request(name, prompt, params) for name, prompt in prompts.items()]
        step = 0
        while waiting or engine.has_work():
            while waiting and (not stagger or step % stagger == 0):
                engine.add(waiting.pop(0))
                if stagger:
                    break
            for delta in engine.step():
                assert delta.error is None, delta.error
                tokens, scores = found[delta.request_id]
                tokens += delta.token_ids
                scores += [(entry.logprob, entry.top) for entry in delta.logprobs or []]
            step += 1
        return found

    return run
