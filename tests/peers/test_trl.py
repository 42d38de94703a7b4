"""TRL judges the losses of fine-tuning: on the same rows and masks, in float32. `make test-peers`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import leanseek
from leanseek import ModelConfig, Transformer
from leanseek.checkpoint.tokenizer import copy_tokenizer
from leanseek.data.batch import Batch
from leanseek.posttraining.dpo import Preference
from leanseek.posttraining.packing import SampleDataset
from leanseek.posttraining.sft_config import SFTConfig
from leanseek.posttraining.shards import prepare_chats
from leanseek.training import Trainer
from leanseek.training.objective import Objective
from tests.small import NETWORK

pytestmark = pytest.mark.peer
MODEL: dict[str, Any] = NETWORK | {
    "vocab_size": 296, "num_hidden_layers": 3, "n_routed_experts": 8, "n_group": 2, "num_nextn_predict_layers": 0,
    "initializer_range": 0.1, "max_position_embeddings": 256,
}  # fmt: skip


class Place:
    def __init__(self, folder: Path, tokenizer: Path):
        self.folder, self.model = folder, folder / "model"
        config = ModelConfig(**MODEL, bos_token_id=0, eos_token_id=1)
        leanseek.save(Transformer(config).init_weights(3), self.model, format="hf")
        copy_tokenizer(tokenizer, self.model, config)
        asks = [[{"role": "user", "content": f"Count to {n}"}] for n in range(1, 12)]
        tells = [" ".join(map(str, range(1, n + 1))) for n in range(1, 12)]
        chats = [{"prompt": ask, "completion": tell} for ask, tell in zip(asks, tells, strict=True)]
        pairs = [
            {"prompt": ask, "chosen": tell, "rejected": tell[::-1] + " no"}
            for ask, tell in zip(asks, tells, strict=True)
        ]
        for name, rows in (("chats", chats), ("pairs", pairs)):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            prepare_chats([folder / f"{name}.jsonl"], folder / name, self.model, validation_fraction=0.0)

    def data(self, name: str) -> SampleDataset:
        return SampleDataset(self.folder / name, "train", 128, kind="chat" if name == "chats" else "preference")

    def step(
        self, batch: Batch, objective: Callable[[SFTConfig], Objective] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of a step of ours from the model."""
        run = SFTConfig.from_dict({
            "name": "x", "model": dict(MODEL), "data": {"seq_len": 128}, "optimizer": {"clip": 1e9},
            "train": {"dtype": "float32", "device": "cpu", "micro_batch_size": 1}, "balance": {"sequence_alpha": 0.0},
        })  # fmt: skip
        model = leanseek.load(self.model, dtype="float32")
        trainer = Trainer(run, model, objective=objective and objective(run))
        found: dict[str, Tensor] = {}
        parameters = dict(trainer.model.named_parameters())
        trainer.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in parameters.items()})  # type: ignore
        return trainer.step(batch, 0).loss, found


@pytest.fixture(scope="module")
def place(chat_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("trl"), chat_tokenizer("<｜User｜>", "<｜Assistant｜>"))


def theirs(place: Place) -> tuple[Any, Any]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(place.model)


def agree(gradients: dict[str, Tensor], model: Any) -> None:
    """Every weight of the peer that has our name: all but the experts', which it may stack otherwise."""
    shared = 0
    for name, parameter in model.named_parameters():
        own = gradients.get(name.removeprefix("model."))
        if own is not None and own.shape == parameter.shape:
            shared += 1
            torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")
    assert shared >= 0.9 * len(gradients), (shared, len(gradients))


def test_sft_loss_and_gradients_are_trls(place: Place, tmp_path: Path) -> None:
    """Ours packed, a row at a time; theirs padded, all at once."""
    from datasets import Dataset
    from trl import SFTConfig as Arguments
    from trl import SFTTrainer

    data = place.data("chats")
    rows = data.epoch(0, 0)
    loss, gradients = place.step(data.batch(rows, 1, rows))
    examples = []
    for sample in range(len(data)):
        ids, learned = data._of(sample)
        examples.append(
            {
                "input_ids": ids.tolist(),
                "labels": [i if on else -100 for i, on in zip(ids.tolist(), learned, strict=True)],
            }
        )
    model, tokenizer = theirs(place)
    arguments = Arguments(
        str(tmp_path), use_cpu=True, report_to=[], max_length=None, gradient_checkpointing=False, bf16=False
    )
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(examples), processing_class=tokenizer)
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    agree(gradients, trainer.model)


def test_dpo_loss_and_gradients_are_trls(place: Place, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = place.data("pairs")
    pairs = [[i, i + 1] for i in range(0, len(data), 2)]
    reference = torch.randn(len(pairs), 2) - 10
    batch = dataclasses.replace(data.batch(pairs, 1), columns={"reference": reference})
    loss, gradients = place.step(batch, Preference)
    samples = [data._of(i) for pair in zip(*pairs, strict=True) for i in pair]  # the chosen, then the rejected
    width = max(len(ids) for ids, _ in samples)
    inputs = {
        key: torch.zeros(len(samples), width, dtype=torch.long)
        for key in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (ids, learned) in enumerate(samples):
        for key, values in (("input_ids", ids), ("attention_mask", ids * 0 + 1), ("completion_mask", learned)):
            inputs[key][row, : len(ids)] = torch.from_numpy(values)
    inputs |= {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    model, tokenizer = theirs(place)
    arguments = DPOConfig(str(tmp_path), beta=0.1, use_cpu=True, report_to=[], gradient_checkpointing=False, bf16=False)
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(model, args=arguments, train_dataset=text, processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    agree(gradients, trainer.model)
