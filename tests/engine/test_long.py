"""A network whose YaRN goes beyond the window it was trained at is served as far as its config says, and no further."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from leanseek import LLM, SamplingParams, Transformer, load, save
from leanseek.config import YarnConfig
from leanseek.engine import EngineError

ORIGINAL, WINDOW = 32, 128


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Transformer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    yarn = YarnConfig(4.0, ORIGINAL, mscale_all_dim=1.0)
    path = tmp_path_factory.mktemp("long") / "model"
    model = make_model(rope_scaling=yarn, max_position_embeddings=WINDOW, num_nextn_predict_layers=0)
    save(model, path)
    return path


def test_the_window_is_max_position_embeddings_and_not_the_original_one(folder: Path) -> None:
    llm = LLM(folder, cache_gib=0.01)
    assert llm.engine.max_model_len == WINDOW
    prompt = torch.randint(0, 300, (WINDOW - 4,), generator=torch.Generator().manual_seed(0)).tolist()
    answer = list(llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids)
    model = load(folder, dtype="float32")
    with torch.no_grad():
        best = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].argmax(-1)
    assert answer == best.tolist()


@pytest.mark.parametrize(
    ("prompt", "wanted", "message"),
    [(WINDOW, 1, "the context is 128, answer included"), (WINDOW - 4, 5, "exceed the context of 128 tokens")],
)
def test_what_goes_beyond_the_window_is_refused(folder: Path, prompt: int, wanted: int, message: str) -> None:
    llm = LLM(folder, cache_gib=0.01)
    with pytest.raises(EngineError, match=message):
        llm.generate([[5] * prompt], SamplingParams(temperature=0, max_tokens=wanted))


def test_an_engine_may_not_be_asked_for_more_than_the_network_has(folder: Path) -> None:
    with pytest.raises(EngineError, match="the model goes to 128"):
        LLM(folder, cache_gib=0.01, max_model_len=WINDOW + 1)
