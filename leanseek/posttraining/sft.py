"""Supervised fine-tuning (5.1): `train` on packed chats, where answers alone are learned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from leanseek.backends import backend_of
from leanseek.checkpoint import find_tokenizer, resolve
from leanseek.checkpoint.training import Resumed
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.data.shards import read_manifest
from leanseek.engine import LLM, Engine, SamplingParams, Tokenizer
from leanseek.model import Transformer
from leanseek.posttraining.packing import SampleDataset
from leanseek.posttraining.sft_config import SFTConfig
from leanseek.posttraining.shards import prepare_chats
from leanseek.tokens import special_tokens
from leanseek.training import Summary, Trainer, train
from leanseek.training.feed import Evaluation, Feed
from leanseek.training.metrics import SAMPLES
from leanseek.training.origin import check_tokenizer
from leanseek.training.part import Part
from leanseek.training.resume import check_kept
from leanseek.training.schedules import batch_size
from leanseek.writing import replace_file

PREPARED = ".chats"  # in the run's folder: shards of rows that were not prepared before
CACHE_GIB = 0.25  # of the engine that answers


def sft(
    run: SFTConfig, *, resume: bool = False, runs: Path = Path("runs"), part: Part | None = None, **options: Any
) -> Summary:
    """Fine-tune to the last step; arguments and errors as those of `train`."""
    part = part or Part()
    feed = _feed(run, part, runs / run.name, resume)
    if run.sft.epochs:
        steps = feed.steps(run.sft.epochs)
        feed.run = run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))
    return train(run, resume=resume, runs=runs, part=part, feed=lambda *_: feed, **options)


def _feed(run: SFTConfig, part: Part, folder: Path, resume: bool) -> ChatFeed:
    path = Path(run.data.path)
    if not (path / "settings.json").is_file():
        path = _prepared(run, part, folder, resume)
    if read_manifest(path).kind == "preference":
        from leanseek.posttraining.dpo import PreferenceFeed

        return PreferenceFeed(run, part, folder, path)
    return ChatFeed(run, part, folder, path)


def _prepared(run: SFTConfig, part: Part, folder: Path, resume: bool) -> Path:
    """Shards of the rows in `data.path`, in the run's folder; a resumed run has them."""
    path = folder / PREPARED
    if part.writes and not (resume and (path / "manifest.json").is_file()):
        tokenizer = find_tokenizer(resolve(run.source)) if run.source else None
        if tokenizer is None:
            raise ConfigError(
                f"data.path = {run.data.path!r} holds rows, and there is no tokenizer to encode them: start from a "
                "model that has one (from = ...), or run `leanseek data prepare --chat` first"
            )
        if not Path(run.data.path).exists():
            raise ConfigError(f"data.path = {run.data.path!r} does not exist")
        prepare_chats([Path(run.data.path)], path, tokenizer, seed=run.train.seed)
    part.gather(None)
    return path


class ChatFeed(Feed):
    """Rows of packed samples of the shards in `path`; `folder` is the run's.

    Raises:
        DataError: the chats are unusable, or too long.
        ConfigError: the model's vocabulary is too small for them.
    """

    kind = "chat"

    def __init__(self, run: SFTConfig, part: Part, folder: Path, path: Path):
        self.run, self.part, self.out = run, part, folder
        cut = run.sft.too_long == "cut"
        self.data, self.held_out = (
            SampleDataset(path, split, run.data.seq_len, cut, self.kind) for split in ("train", "validation")
        )
        if not len(self.data):
            raise ConfigError(f"{path} has no samples to train on")
        ids = len(self.data.token_bytes)
        if run.model.vocab_size < ids:
            raise ConfigError(f"model.vocab_size = {run.model.vocab_size}, but the tokenizer in {path} has {ids} ids")
        self.folder, self.special = path, self.data.special
        self.taken = self.tokens = 0
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self.words = self._words()

    def _words(self) -> str:
        rows = len(self._rows(0))
        full = self.data.tokens / (rows * self.run.data.seq_len)
        words = [f"{len(self.data):,} samples in {rows:,} rows, {full:.0%} full"]
        if self.data.cut:
            words.append(f"{self.data.cut:,} samples cut to {self.run.data.seq_len} tokens")
        if self.data.dropped:
            words.append(f"{self.data.dropped:,} left out, of which nothing learned was left")
        if not len(self.held_out):
            words.append("no chat is held out, so there is no validation")
        return "; ".join(words)

    def steps(self, epochs: float) -> int:
        """Steps of `epochs` passes, the last perhaps going on into the next."""
        rows, size, steps = epochs * len(self._rows(0)), 0, 0
        while size < rows - 1e-6:
            size += batch_size(self.run, steps)
            steps += 1
        return steps

    def attach(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def _rows(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._pack(epoch)
        return self._epoch[1]

    def _pack(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch; every epoch has as many."""
        return self.data.epoch(self.run.train.seed, epoch)

    def _next_rows(self, step: int) -> list[list[int]]:
        """The rows of step `step`, of all ranks."""
        count, each = batch_size(self.run, step), len(self._epoch[1])
        places = [divmod(place, each) for place in range(self.taken, self.taken + count)]
        rows = [self._rows(epoch)[row] for epoch, row in places]
        self.taken += count
        self.tokens += int(sum(self.data.lengths[row].sum() for row in rows))
        return rows

    def batch(self, step: int) -> Batch:
        rows = self._next_rows(step)
        own = self.part.share(len(rows))
        return self.data.batch(rows[own.start : own.stop], self.run.model.lookahead, rows)

    def evaluate(self, trainer: Trainer, step: int) -> Evaluation | None:
        """Loss over what is learned of held-out samples, and answers to their prompts."""
        if not len(self.held_out):
            return None
        sums, t = torch.zeros(3, dtype=torch.float64), self.run.train
        rows, size = self.held_out.epoch(0, 0)[: t.eval_sequences], t.micro_batch_size or t.batch_size
        size *= self.part.replicas
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            own = self.part.share(len(some))
            batch = self.held_out.batch(some[own.start : own.stop] or some[:1], self.run.model.lookahead)
            sums += torch.tensor(trainer.evaluate(batch), dtype=torch.float64) * bool(own)
        nll, mtp, targets = self.part.total(sums).tolist()
        figures: dict[str, Any] = {"val_loss": nll / targets}
        if self.run.model.num_nextn_predict_layers:
            figures["val_mtp_loss"] = mtp / targets
        figures |= self._answers(trainer, step)
        return Evaluation(figures, f"validation loss {nll / targets:.4f} of {int(targets):,} learned tokens")

    def _answers(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """Answer held-out prompts, and add them to samples.jsonl."""
        s = self.run.sft
        if not s.samples or self.part.ranks > 1:
            return {}
        prompts = [self.held_out.prompt(i) for i in range(min(s.samples, len(self.held_out)))]
        room = self.run.model.max_position_embeddings
        prompts = [prompt for prompt in prompts if prompt and len(prompt) < room]
        answers = answer(trainer, self.folder, prompts, s.max_tokens, s.temperature, seed=step)
        path = self.out / SAMPLES
        before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in before if json.loads(line)["step"] < step]
        rows = [json.dumps({"step": step, **row}, ensure_ascii=False) for row in answers]
        replace_file(path, ("\n".join([*kept, *rows]) + "\n").encode())
        ended = sum(row["finish_reason"] == "stop" for row in answers)
        return {"answers_ended": ended / len(answers)} if answers else {}

    def state(self) -> dict[str, Any]:
        return {"rows": self.taken, "tokens": self.tokens, "data": [len(self.data), self.data.tokens]}

    def resume(self, then: Any, found: Resumed) -> list[str]:
        check_tokenizer(found.folder / "tokenizer.json", found.folder, self.folder)
        kept = {"train.seed": "the order", "data.seq_len": "the packing", "sft.too_long": "the packing"}
        check_kept(then, self.run, kept)
        if found.state.get("data") != [len(self.data), self.data.tokens]:
            raise ConfigError(f"{self.folder} holds other chats than those that the run began with; start a new run")
        self.taken, self.tokens = found.state["rows"], found.state["tokens"]
        return []


def answer(
    trainer: Trainer, folder: Path, prompts: list[list[int]], max_tokens: int, temperature: float, seed: int
) -> list[dict[str, Any]]:
    """What the weights as they are answer: prompt and answer as text, and how the answer ended."""
    tokenizer = Tokenizer(folder)
    ends = special_tokens(tokenizer.inner, folder).eos
    model = Transformer(trainer.run.model, trainer.device, trainer.dtype)
    model.load_state_dict(trainer.model.state_dict())
    engine = Engine(backend_of(model), tokenizer, eos_token_ids=ends, cache_gib=CACHE_GIB, step_seconds=60.0)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, skip_special_tokens=False)
    rows = []
    for prompt, output in zip(prompts, LLM(engine).generate(prompts, params), strict=True):
        found = output.outputs[0]
        text = {"prompt": tokenizer.decode(prompt, skip_special_tokens=False), "answer": found.text}
        rows.append(text | {"finish_reason": found.finish_reason})
    return rows
