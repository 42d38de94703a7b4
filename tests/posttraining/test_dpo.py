"""Preferences: the loss is the paper's, whatever way its gradient goes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import leanseek
from leanseek import ModelConfig, Transformer
from leanseek.checkpoint.tokenizer import copy_tokenizer
from leanseek.data.batch import Batch
from leanseek.data.formats import DataError
from leanseek.posttraining.dpo import Preference
from leanseek.posttraining.packing import SampleDataset
from leanseek.posttraining.sft import sft
from leanseek.posttraining.sft_config import SFTConfig
from leanseek.posttraining.shards import prepare_chats
from leanseek.training import Trainer
from tests.small import NETWORK, rewound

MODEL = NETWORK | {"vocab_size": 296, "initializer_range": 0.1, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def run(chat_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SFTConfig:
    folder = tmp_path_factory.mktemp("dpo")
    config = ModelConfig(**MODEL, bos_token_id=0, eos_token_id=1)
    leanseek.save(Transformer(config).init_weights(3), folder / "model", format="hf")
    copy_tokenizer(chat_tokenizer("<｜User｜>", "<｜Assistant｜>"), folder / "model", config)
    rows = [
        {"prompt": [{"role": "user", "content": f"Count to {n % 7}"}], "chosen": "1 2 3 4" + " 5" * (n % 5), "rejected": "b" * (n % 9)}
        for n in range(30)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_chats([folder / "rows.jsonl"], folder / "pairs", folder / "model", validation_fraction=0.2)
    (folder / "run.toml").write_text(
        f'from = "{folder}/model"\n[data]\npath = "{folder}/pairs"\nseq_len = 64\n'
        '[train]\nbatch_size = 6\nmicro_batch_size = 4\ndtype = "float32"\ndevice = "cpu"\neval_every = 4\n'
        "[optimizer]\nlr = 1e-3\n[checkpoint]\nevery = 3\nkeep_last = 9\n[sft]\nbeta = 0.3\n"
    )
    return SFTConfig.load(str(folder / "run.toml"), [])


def pairs(run: SFTConfig) -> Batch:
    data = SampleDataset(Path(run.data.path), "train", 64, kind="preference")
    batch = data.batch([[0, 1], [2, 3], [8, 9], [10, 11]], run.model.lookahead)
    return dataclasses.replace(batch, columns={"reference": torch.randn(4, 2) - 20})


def plain(model: Transformer, batch: Batch) -> torch.Tensor:
    """Log-probabilities [B, 2] by whole logits, each answer alone in its row."""
    found = []
    for row, lengths in enumerate(batch.lengths):
        start = 0
        for length in lengths:
            ids, on = (x[row : row + 1, start : start + length] for x in (batch.tokens, batch.weights))
            logp = F.log_softmax(model(ids)[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
            found.append((logp * on[:, 1:]).sum())
            start += length
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize("micro", [0, 1, 3])
def test_loss_and_gradients_are_the_formulas(run: SFTConfig, micro: int) -> None:
    batch = pairs(run)
    trainer = Trainer(
        dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch_size=micro)),
        objective=Preference(run),
    )
    found = {}
    trainer.optimizer.step = lambda: found.update(  # type: ignore[method-assign]
        {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    )
    trainer.run = dataclasses.replace(trainer.run, optimizer=dataclasses.replace(run.optimizer, clip=1e9))
    result = trainer.step(batch, 0)
    model = Transformer(run.model).init_weights(run.train.seed)
    chosen, rejected = (plain(model, batch) - batch.columns["reference"]).unbind(1)
    loss = -F.logsigmoid(0.3 * (chosen - rejected)).mean()
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == own.keys() and not any(name.startswith("mtp") for name in own)
    for name, gradient in own.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


def test_a_run_prefers_what_was_chosen_and_resumes(run: SFTConfig, tmp_path: Path, quick_runs: None) -> None:
    """It begins at ln 2: the reference is the model itself. A resumed run has the same reference."""
    run = dataclasses.replace(run, sft=dataclasses.replace(run.sft, epochs=2.0))
    sft(run, runs=tmp_path / "whole")
    steps = [json.loads(line) for line in (tmp_path / "whole/run/metrics.jsonl").read_text().splitlines()]
    trained, validated = ([row for row in steps if key in row] for key in ("loss", "val_loss"))
    assert trained[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(trained[0]["reward_margin"]) < 1e-3
    assert trained[-1]["loss"] < 0.5 and trained[-1]["reward_accuracy"] == 1.0
    assert validated[-1]["val_loss"] < 0.6 and validated[-1]["val_reward_accuracy"] > 0.8
    rewound(tmp_path / "whole/run", 3, tmp_path / "parts")
    sft(run, resume=True, runs=tmp_path / "parts")
    last = f"run/checkpoints/step-{trained[-1]['step']}/model.safetensors"
    assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "parts" / last).read_bytes()


def test_pairs_without_a_prompt_are_named(run: SFTConfig, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"chosen": "a", "rejected": "b"}')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: has chosen and rejected, but no prompt"):
        prepare_chats([tmp_path / "rows.jsonl"], tmp_path / "out", Path(run.source))
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": "q", "completion": "a"}'
    )
    with pytest.raises(DataError, match="row 2 is a chat, and rows before it are not"):
        prepare_chats([tmp_path / "rows.jsonl"], tmp_path / "other", Path(run.source))
