"""A GRPO run: rollouts are the batches, the clipped policy gradient is the objective, `training` does the rest.

A rollout is a function of (seed, step, weights). Where several optimizer steps train on one, checkpoints hold it, since
the weights it came from are gone by then. So a killed run repeats itself bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanseek.checkpoint import find_tokenizer, resolve
from leanseek.checkpoint.tokenizer import copy_tokenizer
from leanseek.checkpoint.training import Resumed
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.engine import Tokenizer
from leanseek.engine.engine import GIB
from leanseek.engine.sequence import mix
from leanseek.posttraining.completions import CompletionLog
from leanseek.posttraining.grpo_config import GRPORun
from leanseek.posttraining.losses import advantages, kl_terms, overlong_penalty, spread, token_weights
from leanseek.posttraining.policy import Policy
from leanseek.posttraining.policy_gradient import PolicyGradient, places, scored
from leanseek.posttraining.prompts import Prompt, read_prompts
from leanseek.posttraining.references import References
from leanseek.posttraining.rewards import Rewards
from leanseek.posttraining.rollouts import Completion, Rollouts, seed_of
from leanseek.tokens import open_tokenizer, special_tokens
from leanseek.training.config import RunConfig
from leanseek.training.feed import Evaluation, Feed
from leanseek.training.loop import Summary, train
from leanseek.training.part import Part
from leanseek.training.trainer import Trainer

TOKENIZER = "tokenizer"  # folder of a run
EVALUATION, SHUFFLE = 2**40, 2**41  # in the place of a step, where the seed is of something else
SOLVED = 0.5  # a score above counts as solved

Render = Callable[[list[dict[str, Any]]], str]


@dataclasses.dataclass(frozen=True)
class Chat:
    """How messages become a prompt: the model's chat template, and the strings that end its answers."""

    render: Render
    stop: tuple[str, ...] = ()


def grpo(
    run: GRPORun,
    chat: Callable[[Tokenizer], Chat] | None = None,
    *,
    resume: bool = False,
    runs: Path = Path("runs"),
) -> Summary:
    """Train a policy on rewards; as `training.train`, which says what it raises.

    chat: the chat template of the model's tokenizer, for prompts that are messages.
    """
    if not run.rewards:
        raise ConfigError("a GRPO run needs rewards: add [[rewards]] with function = ...")
    with contextlib.ExitStack() as stack:

        def feed(settings: RunConfig, part: Part) -> RolloutFeed:
            found = RolloutFeed(settings, part, runs / run.name, chat)
            stack.callback(found.rewards.close)
            return found

        return train(run, resume=resume, runs=runs, feed=feed)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A completion that is trained on."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    advantage: float
    kept: bool  # False: cut off, and masked


class RolloutFeed(Feed):
    """Prompts, and groups of completions of them with their rewards.

    Raises:
        ConfigError: there is no tokenizer, or a prompt is too long.
        DataError: the prompts cannot be read.
        InputError: a reward is not right.
    """

    def __init__(self, run: RunConfig, part: Part, folder: Path, chat: Callable[[Tokenizer], Chat] | None):
        assert isinstance(run, GRPORun)
        if part.replicas > 1:
            raise ConfigError("a GRPO run has one process; leave --nproc and torchrun away")
        self.run, self.settings, self.run_folder = run, run.grpo, folder
        self.objective = PolicyGradient(run)
        self.folder = _tokenizer_folder(run, folder)
        self.special = special_tokens(open_tokenizer(self.folder / "tokenizer.json"), self.folder)
        self.tokenizer = Tokenizer(self.folder)
        self.chat = chat(self.tokenizer) if chat else None
        self.prompts, self.held_out = self._read(self.settings.prompts), self._read(self.settings.held_out)
        if not self.prompts:
            raise ConfigError("a GRPO run needs grpo.prompts, a file of rows with a prompt")
        self.rewards = Rewards(run.rewards)
        for rows in (self.prompts, self.held_out):
            if rows:
                self.rewards.check(rows[0][0].columns)
        self.solved_by = self.settings.solved_by or run.rewards[0].name
        self.position = self.tokens = 0  # prompts drawn, tokens trained on
        self.begun = 0  # the step at which this process goes on
        self.reference: int | None = None  # the step whose policy was the reference then
        self.references: References | None = None
        self.rollout: list[Sample] = []
        self.row: dict[str, Any] = {}

    # ---- prompts ----

    def _read(self, path: str) -> list[tuple[Prompt, list[int]]]:
        return [(prompt, self._encode(prompt)) for prompt in read_prompts(Path(path))] if path else []

    def _encode(self, prompt: Prompt) -> list[int]:
        room = self.run.model.max_position_embeddings - self.settings.max_tokens
        if isinstance(prompt.prompt, str):
            ids = self.tokenizer.encode(prompt.prompt)
        elif self.chat is None:
            raise ConfigError("the prompts are messages, and there is no chat template")
        else:
            ids = self.tokenizer.encode(self.chat.render(prompt.prompt), add_special_tokens=False)  # it has its BOS
        if not 0 < len(ids) <= room:
            raise ConfigError(
                f"a prompt has {len(ids)} tokens; beside grpo.max_tokens = {self.settings.max_tokens} the model's "
                f"window holds {room}: {str(prompt.prompt)[:60]!r}"
            )
        return ids

    def _draw(self, count: int) -> list[tuple[Prompt, list[int]]]:
        """The next prompts of an endless stream of shuffled epochs."""
        found = []
        for number in range(self.position, self.position + count):
            epoch, place = divmod(number, len(self.prompts))
            generator = torch.Generator().manual_seed(mix(mix(self.run.train.seed, SHUFFLE), epoch) >> 1)
            order = torch.randperm(len(self.prompts), generator=generator)
            found.append(self.prompts[int(order[place])])
        self.position += count
        return found

    # ---- the run ----

    def attach(self, trainer: Trainer) -> None:
        self.trainer = trainer
        c, settings = self.run.model, self.settings
        room = int(settings.cache_gib * GIB)  # as much again as the engine's cache has
        self.policy = Policy(trainer.model, trainer.dtype, self.run.train.precision, room)
        self.objective.attach(self.policy)  # type: ignore[union-attr]
        longest = max(len(ids) for _, ids in (*self.prompts, *self.held_out))
        options: dict[str, Any] = {} if settings.speculate < 0 else {"speculate": settings.speculate}
        self.sampler = Rollouts(
            self.policy,
            self.tokenizer,
            sorted({*c.eos_token_ids, *self.special.eos}),
            max_batch=settings.streams,
            cache_gib=settings.cache_gib,
            max_model_len=longest + settings.max_tokens,
            **options,
        )
        self._keep_tokenizer()
        self.log, self.references = CompletionLog(self.run_folder, self.begun), None
        if settings.beta:
            self.references = References(self.run_folder, self.policy, self.begun, self.reference)

    def _keep_tokenizer(self) -> None:
        """In the run's folder: a resumed run does not ask for the model with which it began."""
        home, partial = self.run_folder / TOKENIZER, self.run_folder / f".{TOKENIZER}.partial"
        if not home.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            copy_tokenizer(self.folder, partial, self.run.model)
            partial.rename(home)
        self.folder = home

    def batch(self, step: int) -> Batch:
        updates, size = self.run.updates, self.run.train.batch_size
        turn = step % updates
        self.row = {}
        if self.references and self.settings.reference_every and step and step % self.settings.reference_every == 0:
            self.references.replace(step)
        if turn == 0:
            self._roll(step)
        epoch, place = divmod(turn * size, len(self.rollout))
        generator = torch.Generator().manual_seed(mix(mix(self.run.train.seed, step - turn), epoch) >> 1)
        order = torch.randperm(len(self.rollout), generator=generator).tolist()[place : place + size]
        samples = [self.rollout[i] for i in order]
        batch = self._tensors(samples)
        self._trained = sum(len(s.prompt) + len(s.tokens) for s in samples), time.perf_counter()
        self.tokens += self._trained[0]
        return batch

    def figures(self) -> dict[str, Any]:
        """Of the rollout, in the row of the first step on it; and how fast the step was without it."""
        tokens, began = self._trained
        return self.row | {"train_tokens_per_second": tokens / (time.perf_counter() - began)}

    def _roll(self, step: int) -> None:
        """Sample, score and compare: `rollout` and its figures."""
        groups: list[list[Sample]] = []
        wanted, started = self.run.rollout_prompts, time.perf_counter()
        sampled, spent = _Counts(), 0.0
        for turn in range(self.settings.refill + 1):
            missing = wanted - len(groups)
            prompts = self._draw(missing)
            begun = time.perf_counter()
            seeds = [seed_of(self.run.train.seed, step, turn * wanted + number) for number in range(missing)]
            completions = self._complete(
                [ids for _, ids in prompts], self.settings.group, self.settings.temperature, seeds, keep=True
            )
            spent += time.perf_counter() - begun
            found = self._judged(step, prompts, completions, sampled)
            last = turn == self.settings.refill
            groups += [samples for samples, differ in found if differ or last]
            if len(groups) == wanted:
                break
        self.rollout = [sample for group in groups for sample in group]
        self.row = sampled.figures() | {
            "rollout_tokens_per_second": sampled.tokens / spent,
            "rollout_s": time.perf_counter() - started,
            "prompts": self.position,
        }

    def _complete(
        self, prompts: Sequence[list[int]], choices: int, temperature: float, seeds: Sequence[int], keep: bool = False
    ) -> list[list[Completion]]:
        stop = self.chat.stop if self.chat else ()
        return self.sampler.complete(prompts, choices, self.settings.max_tokens, temperature, seeds, stop, keep)

    def _scores(
        self, prompts: Sequence[tuple[Prompt, list[int]]], completions: Sequence[Sequence[Completion]]
    ) -> tuple[list[float | None], dict[str, list[float | None]]]:
        flat = [(prompt, c) for (prompt, _), group in zip(prompts, completions, strict=True) for c in group]
        columns = {name: [p.columns[name] for p, _ in flat] for name in flat[0][0].columns}
        return self.rewards.score(
            [p.prompt for p, _ in flat], [c.text for _, c in flat], [c.token_ids for _, c in flat], **columns
        )

    def _judged(
        self,
        step: int,
        prompts: Sequence[tuple[Prompt, list[int]]],
        completions: Sequence[Sequence[Completion]],
        counts: _Counts,
    ) -> list[tuple[list[Sample], bool]]:
        """Each group as samples with their advantages, and whether its rewards differ."""
        g = self.settings
        total, by_name = self._scores(prompts, completions)
        rewards = torch.tensor([float("nan") if r is None else r for r in total], dtype=torch.float64)
        rewards = rewards.view(len(prompts), g.group)
        counts.add(rewards, by_name, completions)
        if g.cut_off == "penalty":
            rewards += torch.tensor(
                [
                    [overlong_penalty(len(c.token_ids), g.max_tokens, g.penalty_tokens) for c in cs]
                    for cs in completions
                ],
                dtype=torch.float64,
            )
        if g.beta and g.kl == "k1":
            rewards -= g.beta * self._k1(prompts, completions)
        gains, differ = advantages(rewards, g.divide_by_std or g.loss == "paper"), spread(rewards)
        self.log.write(step, prompts, completions, total, by_name, gains.flatten().tolist())
        return [
            ([self._sample(ids, c, gain) for c, gain in zip(group, own, strict=True)], bool(different))
            for (_, ids), group, own, different in zip(prompts, completions, gains.tolist(), differ, strict=True)
        ]

    def _sample(self, prompt: list[int], c: Completion, gain: float) -> Sample:
        return Sample(prompt, c.token_ids, c.logprobs, gain, not (c.cut_off and self.settings.cut_off == "mask"))

    def _k1(self, prompts: Sequence[tuple[Prompt, list[int]]], completions: Sequence[Sequence[Completion]]) -> Tensor:
        """log π / π_ref of each completion [P, G], summed over its tokens."""
        pairs = zip(prompts, completions, strict=True)
        samples = [self._sample(ids, c, 0.0) for (_, ids), group in pairs for c in group]
        batch = self._tensors(samples)
        where = places(batch)
        gaps = kl_terms("k1", batch.columns["old"], batch.columns["reference"]).double() * where.scored
        return gaps.sum(1).view(len(prompts), self.settings.group).cpu()

    def _tensors(self, samples: Sequence[Sample]) -> Batch:
        """A batch of rows [prompt, completion], padded, with the columns of PolicyGradient."""
        g, lengths = self.settings, [len(s.prompt) + len(s.tokens) - 1 for s in samples]
        width = max(lengths)
        tokens = torch.zeros(len(samples), width + self.run.model.lookahead, dtype=torch.int64)
        old = torch.zeros(len(samples), width)
        for row, s in enumerate(samples):
            tokens[row, : lengths[row] + 1] = torch.tensor([*s.prompt, *s.tokens])
            old[row, len(s.prompt) - 1 : lengths[row]] = torch.tensor(s.logprobs)
        counts = [len(s.tokens) for s in samples]
        columns = {
            "start": torch.tensor([len(s.prompt) for s in samples]),
            "old": old,
            "advantage": torch.tensor([s.advantage for s in samples]),
            "weight": token_weights(g.loss, counts, [s.kept for s in samples], g.max_tokens),
            "tokens": torch.full((len(samples),), float(sum(counts))),
        }
        batch = Batch(tokens, len(samples), tuple((n,) for n in lengths), columns=columns)
        if self.references:
            columns["reference"] = self._reference(batch)
        return batch

    @torch.no_grad()
    def _reference(self, batch: Batch) -> Tensor:
        """Log-probabilities of the completions under the reference, [B, T]."""
        assert self.references is not None
        reference, found = self.references.policy, torch.zeros_like(batch.columns["old"])
        size, first = self.run.train.micro_batch_size, 0
        for part in batch.to(self.trainer.device).split(size):
            where = places(part)
            rows = slice(first, first := first + len(part))
            logp = scored(reference, part, where, self.settings.temperature).logp
            found[rows][where.scored.cpu()] = logp.cpu()
        return found

    # ---- how good it is ----

    def evaluate(self, trainer: Trainer, step: int) -> Evaluation | None:
        """pass_at_1 of the held-out prompts: the share whose greedy answer is solved; pass_at_K from samples."""
        if not self.held_out:
            return None
        seeds = [seed_of(self.run.train.seed, EVALUATION, number) for number in range(len(self.held_out))]
        greedy, lengths = self._solved(1, 0.0, seeds)
        found = {"pass_at_1": sum(map(any, greedy)) / len(greedy), "held_out_length": lengths}
        if k := self.settings.pass_k:
            sampled, _ = self._solved(k, self.settings.temperature, seeds)
            found[f"pass_at_{k}"] = sum(map(any, sampled)) / len(sampled)
        return Evaluation(found, ", ".join(f"{name} {value:.3f}" for name, value in found.items()))

    def _solved(self, choices: int, temperature: float, seeds: Sequence[int]) -> tuple[list[list[bool]], float]:
        """Of each held-out prompt's answers, which are solved; and their mean length."""
        answers = self._complete([ids for _, ids in self.held_out], choices, temperature, seeds)
        _, by_name = self._scores(self.held_out, answers)
        scores = by_name[self.solved_by]
        solved = [score is not None and score > SOLVED for score in scores]
        tokens = sum(len(c.token_ids) for group in answers for c in group)
        return [solved[i : i + choices] for i in range(0, len(solved), choices)], tokens / len(solved)

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """With the rollout, if steps are still to train on it."""
        return {
            "tokens": self.tokens,
            "prompts": self.position,
            "reference": self.references.step if self.references else None,
            "rollout": [dataclasses.asdict(s) for s in self.rollout] if self.run.updates > 1 else [],
        }

    def resume(self, then: RunConfig, found: Resumed) -> list[str]:
        assert isinstance(then, GRPORun)
        for key, was, now in (
            ("train.seed", then.train.seed, self.run.train.seed),
            ("the steps on a rollout", then.updates, self.run.updates),
        ):
            if was != now:
                raise ConfigError(f"{key} = {now}, but the run continues with {was}; keep it, or start a new run")
        state = found.state
        self.tokens, self.position, self.begun = state["tokens"], state["prompts"], found.step
        self.reference = state["reference"]
        self.rollout = [Sample(**s) for s in state["rollout"]]
        return []


class _Counts:
    """Sums over the completions of a step's rollout, groups that were replaced included."""

    def __init__(self) -> None:
        self.groups = self.alike = self.completions = self.cut_off = self.tokens = 0
        self.rewards: dict[str, list[float]] = {"": []}

    def add(
        self, rewards: Tensor, by_name: dict[str, list[float | None]], completions: Sequence[Sequence[Completion]]
    ) -> None:
        flat = [c for group in completions for c in group]
        self.groups += len(rewards)
        self.alike += int((~spread(rewards)).sum())
        self.completions += len(flat)
        self.cut_off += sum(c.cut_off for c in flat)
        self.tokens += sum(len(c.token_ids) for c in flat)
        for name, scores in {"": rewards[~rewards.isnan()].tolist(), **by_name}.items():
            self.rewards.setdefault(name, []).extend(s for s in scores if s is not None)

    def figures(self) -> dict[str, Any]:
        found = {
            f"reward/{name}" if name else "reward": sum(scores) / len(scores)
            for name, scores in self.rewards.items()
            if scores
        }
        return found | {
            "no_spread": self.alike / self.groups,
            "cut_off": self.cut_off / self.completions,
            "completion_length": self.tokens / self.completions,
        }


def _tokenizer_folder(run: GRPORun, folder: Path) -> Path:
    """Where the tokenizer is: the run's own, the checkpoint's with which it begins, or that of `data.path`."""
    if (folder / TOKENIZER / "tokenizer.json").is_file():
        return folder / TOKENIZER
    found = find_tokenizer(resolve(run.source)) if run.source else Path(run.data.path) if run.data.path else None
    if found is None or not (found / "tokenizer.json").is_file():
        where = run.source or run.data.path or "data.path, which is not set"
        raise ConfigError(f"there is no tokenizer.json in {where}: begin with `from = PATH` of a model that has one")
    return found
