"""A policy small enough to train in a test, with a tokenizer, prompts and a reward."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leanseek import ModelConfig, Transformer, checkpoint
from leanseek.checkpoint.tokenizer import copy_tokenizer
from leanseek.posttraining.grpo_config import GRPORun
from tests.small import GROUPED, pair_tokenizer

VOCAB = 272

SMALL: dict[str, Any] = GROUPED | {
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 0,
}

REWARD = '''
def vowels(prompts, completions, completion_ids, **columns):
    """The share of tokens below 100: something that a policy can learn in a few steps."""
    return [sum(t < 100 for t in ids) / len(ids) for ids in completion_ids]


def short(prompts, completions, completion_ids, **columns):
    return [None if len(ids) > 6 else 1.0 for ids in completion_ids]
'''


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random weights, and a byte-level tokenizer whose token 0 ends a text."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    inner = pair_tokenizer("one two three four five six seven " * 3, VOCAB, ["<eos>", "<think>"])
    model = Transformer(ModelConfig(**SMALL)).init_weights(1)
    checkpoint.save(model, folder)
    inner.save(str(folder / "tokenizer.json"))
    copy_tokenizer(folder / "tokenizer.json", folder.parent, model.config)
    return folder


@pytest.fixture
def make_run(policy_folder: Path, tmp_path: Path) -> Callable[..., GRPORun]:
    """make_run(*overrides, rewards=("vowels",)): a run of three steps in tmp_path."""
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    rows = [json.dumps({"prompt": f"{a} {b} {a}", "answer": i}) for i, (a, b) in enumerate(itertools.pairwise(words))]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    (tmp_path / "held.jsonl").write_text("\n".join(rows[:2]))
    (tmp_path / "reward.py").write_text(REWARD)

    def make(*overrides: str, rewards: tuple[str, ...] = ("vowels",)) -> GRPORun:
        tables = "".join(
            f'[[rewards]]\nfunction = "{tmp_path / "reward.py"}:{name}"\nseconds = 900.0\n' for name in rewards
        )
        (tmp_path / "run.toml").write_text(
            f'from = "{policy_folder}"\n'
            f'[train]\nsteps = 3\nbatch_size = 12\ndtype = "float32"\neval_every = 2\n[optimizer]\nlr = 3e-3\n'
            f"[checkpoint]\nevery = 1\nkeep_last = 100\n"
            f'[grpo]\nprompts = "{tmp_path / "prompts.jsonl"}"\nheld_out = "{tmp_path / "held.jsonl"}"\n'
            f'group = 4\nmax_tokens = 8\ncache_gib = 0.01\ncut_off = "keep"\n{tables}'
        )
        run = GRPORun.load(str(tmp_path / "run.toml"), list(overrides))
        assert isinstance(run, GRPORun)
        return run

    return make


@pytest.fixture
def random_policy() -> Callable[..., Transformer]:
    """random_policy(**changes): a network whose MTP module drafts, with weights large enough that routes matter."""
    return lambda **changes: Transformer(ModelConfig(**SMALL | changes)).init_weights(2)
