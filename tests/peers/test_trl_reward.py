"""The reward model's loss and gradients against TRL's collator and RewardTrainer, over transformers' network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import leanseek
from leanseek import Transformer
from leanseek.data.batch import Batch
from leanseek.posttraining.reward_model import Pairwise, packed

pytestmark = pytest.mark.peer
PAD = 95


def test_loss_and_gradients_equal_trls(tiny_model: Callable[..., Transformer], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import transformers
    from trl import RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    ours = tiny_model(num_labels=1)
    leanseek.save(ours, tmp_path / "rm")
    theirs: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    theirs.config.pad_token_id = PAD
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randint(0, PAD, (n,), generator=generator).tolist() for n in (6, 9, 4, 4, 12, 3)]
    pairs = [flat[0:2], flat[2:4], flat[4:6]]

    tokens, lengths = packed(pairs, 1)
    found = Pairwise(torch.float32)(ours, Batch(tokens, len(pairs), lengths), 0)
    found.backward()

    inputs = DataCollatorForPreference(PAD)([{"chosen_ids": c, "rejected_ids": r} for c, r in pairs])
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=theirs, args=SimpleNamespace(center_rewards_coefficient=None), accelerator=same, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    loss = RewardTrainer.compute_loss(trainer, theirs, inputs)
    loss.backward()
    assert float(found.main.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    judge = dict(theirs.named_parameters())
    for name in ("score.weight", "embed_tokens.weight", "norm.weight", "layers.0.self_attn.o_proj.weight"):
        their = judge[name if name.startswith("score") else f"model.{name}"].grad
        torch.testing.assert_close(ours.get_parameter(name).grad, their, rtol=1e-3, atol=1e-6)
