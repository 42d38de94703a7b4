"""Fine-tuning on chats: what is packed, learned, resumed, reported and served."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leanseek import LLM, Transformer
from leanseek.checkpoint.tokenizer import copy_tokenizer
from leanseek.config import ConfigError, ModelConfig
from leanseek.data.formats import DataError
from leanseek.engine import SamplingParams
from leanseek.posttraining.packing import SampleDataset, pack
from leanseek.posttraining.sft import sft
from leanseek.posttraining.sft_config import SFTConfig
from leanseek.posttraining.shards import prepare_chats
from leanseek.server.templates import template_of
from leanseek.training import Trainer
from tests.small import NETWORK, rewound

MODEL = NETWORK | {"vocab_size": 296, "initializer_range": 0.1, "max_position_embeddings": 256}
TOKENS = ("<｜User｜>", "<｜Assistant｜>")


class Place:
    """A model to fine-tune, and chats for it."""

    def __init__(self, folder: Path, tokenizer: Path):
        import leanseek

        self.folder = folder
        self.model, self.chats, self.rows = folder / "model", folder / "chats", folder / "rows.jsonl"
        config = ModelConfig(**MODEL, bos_token_id=0, eos_token_id=1)
        leanseek.save(Transformer(config).init_weights(3), self.model, format="hf")
        copy_tokenizer(tokenizer, self.model, config)
        rng = np.random.default_rng(0)
        rows = [self.row(i, int(rng.integers(1, 12))) for i in range(40)]
        self.rows.write_text("\n".join(map(json.dumps, rows)))
        prepare_chats([self.rows], self.chats, self.model, validation_fraction=0.2)

    @staticmethod
    def row(number: int, length: int) -> dict[str, Any]:
        ask = {"role": "user", "content": f"Count to {length}"}
        tell = {"role": "assistant", "content": " ".join(map(str, range(1, length + 1)))}
        return {"messages": [ask, tell] if number % 3 else [ask, tell, ask, tell]}

    def config(self, **sections: dict[str, Any]) -> SFTConfig:
        table: dict[str, Any] = {
            "name": "run",
            "from": str(self.model),
            "data": {"path": str(self.chats), "seq_len": 128},
            "train": {"batch_size": 3, "micro_batch_size": 2, "eval_every": 4, "dtype": "float32", "device": "cpu"},
            "optimizer": {"lr": 3e-3},
            "schedule": {"final_lr": 1e-3, "last_lr": 1e-3},
            "checkpoint": {"every": 3, "keep_last": 9},
            "sft": {"epochs": 2.0, "samples": 2, "max_tokens": 8},
        }
        path = self.folder / "run.toml"
        import tomli_w

        path.write_text(
            tomli_w.dumps({k: v | sections.get(k, {}) if isinstance(v, dict) else v for k, v in table.items()})
        )
        return SFTConfig.load(str(path), [])


@pytest.fixture(scope="module", autouse=True)
def _small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leanseek.posttraining.sft.CACHE_GIB", 0.01)
        yield


@pytest.fixture(scope="module")
def place(chat_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("sft"), chat_tokenizer(*TOKENS))


def rows(run: Path) -> list[dict[str, Any]]:
    clock = ("tokens_per_second", "flops_per_second", "mfu", "elapsed_s")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in found if "event" not in row]


# ---- packing ----


def test_rows_are_nearly_full_and_hold_every_sample_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    for seed in range(3):
        found = pack(lengths, 128, np.random.default_rng(seed).permutation(500))
        assert sorted(i for row in found for i in row) == list(range(500))
        assert max(lengths[row].sum() for row in found) <= 128
        assert len(found) == len(pack(lengths, 128, np.arange(500))) <= 1.03 * lengths.sum() / 128


def test_packing_keeps_the_mask_trl_3728(place: Place) -> None:
    """What is learned of a row is what is learned of its samples, and the weights are the step's."""
    data = SampleDataset(place.chats, "train", 128)
    first, second = data.epoch(0, 0)[:2]
    batch = data.batch([first], 2, [first, second])
    assert batch.sequences == 2 and batch.lengths == (tuple(data.lengths[first]),) and len(first) > 1
    start = 0
    total = data.learned[first].sum() + data.learned[second].sum()
    for sample in first:
        ids, learned = data._of(sample)
        part = slice(start, start := start + len(ids))
        assert batch.tokens[0, part].tolist() == ids.tolist()
        assert torch.equal(batch.weights[0, part] > 0, torch.from_numpy(learned))
        assert ids[-1] == data.special.eos[0] and learned[-1]  # pad = eos does not hide the end token (trl#1623)
    assert batch.weights[0, start:].sum() == 0
    assert float(batch.weights.sum()) == pytest.approx(data.learned[first].sum() / total)


def test_an_epoch_has_every_sample_and_each_its_order(place: Place) -> None:
    data = SampleDataset(place.chats, "train", 128)
    one, two = data.epoch(5, 0), data.epoch(5, 1)
    assert one != two and len(one) == len(two) and one == SampleDataset(place.chats, "train", 128).epoch(5, 0)
    for epoch in (one, two):
        assert sorted(i for row in epoch for i in row) == list(range(len(data)))


def test_too_long_is_refused_or_cut_never_in_silence(place: Place) -> None:
    longest = int(SampleDataset(place.chats, "train", 128).lengths.max())
    with pytest.raises(
        DataError, match=rf"samples are longer than data\.seq_len = {longest - 1}, the longest {longest}"
    ):
        SampleDataset(place.chats, "train", longest - 1)
    cut = SampleDataset(place.chats, "train", longest - 1, cut=True)
    assert cut.cut >= 1 and cut.lengths.max() == longest - 1 and cut.dropped == 0
    short = SampleDataset(place.chats, "train", 8, cut=True)
    assert short.dropped > 0 and (short.learned > 0).all()


# ---- a run ----


@pytest.fixture(scope="module")
def finished(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    sft(place.config(), runs=runs)
    return runs / "run"


def test_a_run_learns_and_reports(place: Place, finished: Path) -> None:
    found = rows(finished)
    steps = [row for row in found if "loss" in row]
    data = SampleDataset(place.chats, "train", 128)
    assert len(steps) == -(-2 * len(data.epoch(0, 0)) // 3)
    assert steps[-1]["lr"] < steps[0]["lr"] == 3e-3
    validated = [row for row in found if "val_loss" in row]
    assert validated[-1]["val_loss"] < validated[0]["val_loss"] and "val_mtp_loss" in validated[0]
    answers = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in answers} == {row["step"] for row in validated}
    assert all(row["prompt"].startswith("<｜begin▁of▁sentence｜><｜User｜>Count to") for row in answers)
    page = (finished / "report.html").read_text()
    assert "Answers" in page and "Count to" in page


def test_the_result_serves_with_its_template(place: Place, finished: Path) -> None:
    """It ends its answer, and prompts as it was trained."""
    llm = LLM(str(finished), cache_gib=0.01)
    template = template_of(llm.tokenizer, llm.engine.config)
    prompt = llm.tokenizer.encode(
        template.render([{"role": "user", "content": "Count to 3"}]), add_special_tokens=False
    )
    assert llm.tokenizer.decode(prompt, False) == "<｜begin▁of▁sentence｜><｜User｜>Count to 3<｜Assistant｜>"
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=40, temperature=0))
    assert output.outputs[0].token_ids
    assert list(finished.glob("checkpoints/*/chat_template.jinja"))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_killed_run_repeats_itself_bit_for_bit(
    place: Place, tmp_path: Path, precision: str, quick_runs: None
) -> None:
    run = place.config(train={"precision": precision, "dtype": "bfloat16"}, sft={"epochs": 1.0})
    sft(run, runs=tmp_path / "whole")
    rewound(tmp_path / "whole/run", 3, tmp_path / "parts")
    sft(run, resume=True, runs=tmp_path / "parts")
    assert rows(tmp_path / "parts/run") == rows(tmp_path / "whole/run")
    last = f"run/checkpoints/step-{rows(tmp_path / 'whole/run')[-1]['step']}/model.safetensors"
    assert (tmp_path / "parts" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    assert (tmp_path / "parts/run/samples.jsonl").read_text() == (tmp_path / "whole/run/samples.jsonl").read_text()


def test_rows_are_prepared_where_they_were_not(place: Place, tmp_path: Path, quick_runs: None) -> None:
    """With the tokenizer of the model; the result is that of prepared ones."""
    run = place.config(data={"path": str(place.rows)}, sft={"epochs": 0.2, "samples": 0})
    sft(run, runs=tmp_path)
    assert (tmp_path / "run/.chats/manifest.json").is_file()
    assert len([row for row in rows(tmp_path / "run") if "loss" in row]) >= 1


def test_a_changed_packing_is_refused(place: Place, finished: Path) -> None:
    runs = finished.parent
    with pytest.raises(
        ConfigError, match=r"data\.seq_len = 200, but the run continues with 128: the packing depends on it"
    ):
        sft(place.config(data={"seq_len": 200}, sft={"epochs": 9.0}), resume=True, runs=runs)


def test_texts_are_no_chats(place: Place, tmp_path: Path) -> None:
    from leanseek.data.prepare import prepare

    (tmp_path / "text.jsonl").write_text('{"text": "war and peace"}\n' * 3)
    prepare([tmp_path / "text.jsonl"], tmp_path / "shards", tokenizer=place.model, workers=1)
    with pytest.raises(DataError, match="holds texts, to pre-train on; prepare chats with"):
        sft(place.config(data={"path": str(tmp_path / "shards")}), runs=tmp_path)


def test_defaults_are_the_reports() -> None:
    run = SFTConfig(name="x", model=ModelConfig(**MODEL | {"max_position_embeddings": 4096}))
    assert (run.optimizer.lr, run.schedule.final_lr, run.sft.epochs) == (5e-6, 1e-6, 2.0)
    from leanseek.training.schedules import learning_rate

    rates = [learning_rate(run, step) for step in range(run.train.steps)]
    assert rates[0] == 5e-6 and rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(1e-6, rel=1e-2)


def test_packed_and_alone_have_the_same_gradient(place: Place) -> None:
    """A step over packed rows, and one over the same samples each in a row of its own."""
    data = SampleDataset(place.chats, "train", 128)
    packed = data.epoch(0, 0)[:2]
    alone = [[sample] for row in packed for sample in row]
    found = []
    for samples, size in ((packed, 1), (alone, 0)):
        trainer = Trainer(place.config(balance={"sequence_alpha": 0.0}, train={"micro_batch_size": size}))
        result = trainer.step(data.batch(samples, 2, samples), 1)
        found.append((result.loss, result.mtp_loss, result.grad_norm))
        assert {int(c.sum()) for c in result.counts.values()} == {
            2 * int(data.lengths[[i for row in packed for i in row]].sum())
        }
    assert found[0] == pytest.approx(found[1], rel=1e-5)
