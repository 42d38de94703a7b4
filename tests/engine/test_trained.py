"""On a trained model, whose margins are a real model's: 50 prompts against transformers, and drafts that pay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import leanseek
from leanseek import Transformer, checkpoint
from leanseek.engine import SamplingParams, Tokenizer, speculation

LENGTH = 32
STEPS = 300
PARAMS = SamplingParams(temperature=0, max_tokens=LENGTH)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> torch.Tensor:
    files = sorted((Path(leanseek.__file__).parent / "model").glob("*.py"))
    return torch.tensor(tokenizer.encode("".join(file.read_text() for file in files)))


@pytest.fixture(scope="module")
def trained(make_model: Callable, text: torch.Tensor) -> Transformer:
    """A short training on this package's own source, with the MTP loss."""
    torch.set_num_threads(1)
    model = make_model(hidden_size=96, num_hidden_layers=3, moe_intermediate_size=48, initializer_range=0.04)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 20) * (1 - step / STEPS)
        starts = torch.randint(0, len(text) - 66, (8,), generator=generator)
        batch = text[starts[:, None] + torch.arange(66)]
        hidden, _ = model.hidden(batch[:, :64])
        ahead, _ = model.predict_ahead(hidden, batch[:, 1:65])
        loss = sum(model.head(state, batch[:, k : k + 64]) for k, state in enumerate((hidden, ahead[0]), start=1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 4.0, "the model did not learn"  # it begins with 2 ln 320 = 11.5
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(text: torch.Tensor) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, len(text) - 80, (50,), generator=generator).tolist()
    return [text[start : start + 5 + i].tolist() for i, start in enumerate(starts)]


def test_50_prompts_greedy_as_transformers(
    trained: Transformer, prompts: list[list[int]], make_engine: Callable, serve: Callable, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint.save(trained, tmp_path / "model")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
        expected.append(theirs[0, len(prompt) :].tolist())
    settings: list[dict[str, Any]] = [
        {"speculate": 0, "max_batch": 1},
        {"speculate": 1},
        {"speculate": 3, "step_tokens": 40, "page_size": 4},
    ]
    for options in settings:
        assert serve(make_engine(trained, **options), prompts, PARAMS) == expected, options


def test_drafts_of_a_trained_module_are_mostly_right(
    trained: Transformer,
    prompts: list[list[int]],
    make_engine: Callable,
    serve: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speculation, "TRIALS", 10**9)
    engine = make_engine(trained, speculate=2)
    serve(engine, prompts, PARAMS)
    stats = engine.stats()
    rates = [kept / made for kept, made in zip(stats.accepted_tokens, stats.draft_tokens, strict=True)]
    assert rates[0] > 0.4  # the text it learns is this package's own source, and changes with it
    assert rates[1] > 0.15
