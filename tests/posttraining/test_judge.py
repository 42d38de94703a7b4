"""The generative judge: P(yes) as the model itself has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import leanseek
from leanseek.errors import InputError
from leanseek.posttraining import graders
from leanseek.posttraining.judge import Judge


def test_p_yes_is_the_models_own(chat_model: Callable[..., Path], small_cache: None) -> None:
    folder = chat_model()
    prompts: list[Any] = [[{"role": "user", "content": "1+1?"}], "2+2="]
    completions: list[Any] = [[{"role": "assistant", "content": "<think>so</think> 2"}], "5"]
    arguments: dict[str, Any] = {
        "path": str(folder),
        "question": "{prompt} {answer} {reference}?",
        "yes": "y",
        "no": "no",
    }
    found = graders.judge(prompts, completions, answer=["2", 4], **arguments)
    model, judge = leanseek.load(folder), Judge(folder)
    tokenizer = judge._scorer.tokenizer
    for question, share in zip(("1+1? 2 2?", "2+2= 5 4?"), found, strict=True):
        text = judge._template.render([{"role": "user", "content": question}])
        before = tokenizer.encode(text, add_special_tokens=False)
        each = []
        for reply in ("y", "no"):
            ids = tokenizer.encode(reply, add_special_tokens=False)
            with torch.no_grad():
                logprobs = model(torch.tensor([before + ids]))[0].float().log_softmax(-1)
            each.append(float(sum(logprobs[len(before) - 1 + i, token] for i, token in enumerate(ids))))
        assert share == pytest.approx(float(torch.tensor(each).softmax(0)[0]), abs=1e-4)
        assert 0 < share < 1
    with pytest.raises(InputError, match="the reward judge needs a column answer or ground_truth"):
        graders.judge(prompts, completions, **arguments)
