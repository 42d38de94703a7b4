"""Small networks, runs and tokenizers that tests of several rooms stand on."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import tokenizers
import tomli_w

from leanseek.checkpoint.training import steps_on_disk

NETWORK: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GROUPED = NETWORK | {  # node-limited routing, a key whose parts differ in width, and an MTP module that drafts
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
}


def run_toml(model: dict[str, Any], **more: Any) -> str:
    """A run's file: NETWORK with the changes of `model`, on the CPU in float32; `more` are sections, or a `name`."""
    sections = {"model": NETWORK | {"vocab_size": 300} | model} | more
    return tomli_w.dumps(sections | {"train": {"dtype": "float32", "device": "cpu"} | more.get("train", {})})


def rewound(run: Path, step: int, folder: Path) -> Path:
    """A copy of a run, in `folder`, as kill -9 leaves it some steps after it wrote `step`'s checkpoint."""
    copy = shutil.copytree(run, folder / run.name)
    for later in (s for s in steps_on_disk(copy) if s > step):
        shutil.rmtree(copy / f"checkpoints/step-{later}")
    return copy


def forked(run: Callable[[], object]) -> BaseProcess:
    """`run` in a fork of this process, which has imported everything."""
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def wait_for(child: BaseProcess, moment: Callable[[], bool]) -> None:
    """Until that moment, before which the process may not end."""
    deadline = time.monotonic() + 120
    while not moment():
        assert child.is_alive(), child.exitcode
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def kill_when(child: BaseProcess, moment: Callable[[], bool]) -> None:
    """kill -9 at that moment, before which the process may not end."""
    wait_for(child, moment)
    child.kill()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def byte_tokenizer(special: Sequence[str], added: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Tokens of a single byte, behind them the `special` and then the `added` ones, which are ordinary text."""
    spelled = [*special, *added, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(spelled)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    return inner


def pair_tokenizer(text: str, vocab: int, special: Sequence[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE of `vocab` ids, of which the first are the special ones."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator([text], trainer)
    return inner
