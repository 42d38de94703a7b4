"""Rejection sampling (5.1): several answers to each prompt, of which those that the rewards accept become SFT rows.

What is done is on disk after every few prompts, and an answer depends on (seed, prompt number) alone: the same call
after a kill goes on where it was, and ends with the file that an uninterrupted one writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from leanseek.engine import LLM, CompletionOutput, SamplingParams
from leanseek.errors import InputError
from leanseek.posttraining.prompts import Message, Prompt
from leanseek.posttraining.rewards import RewardConfig, Rewards, reward_tables
from leanseek.reading import shorten
from leanseek.writing import alone, replace_file, writing

AT_ONCE = 256  # answers sampled together; a kill loses at most these
KEEP = ("shortest", "first", "all")
_THINK = "<think>"

Render = Callable[[Sequence[Message]], str]  # messages -> the prompt, special tokens included


@dataclass(frozen=True)
class SampleConfig:
    """n: answers to a prompt. threshold: the least weighted sum of rewards of an answer to keep; None: the sum of the
    weights, which answers reach that have 1 in each. system: a system prompt, under which answers are sampled and
    written."""

    n: int = 4
    seed: int = 0
    keep: str = "shortest"  # of a prompt's accepted answers
    threshold: float | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise InputError(f"--keep {shorten(self.keep)} is not one of {', '.join(KEEP)}")


class _Asked(NamedTuple):
    """A prompt as it is sampled: itself, its ids, and what of the answer the template wrote already (`<think>`)."""

    prompt: str | list[dict[str, Any]]
    ids: list[int]
    opened: str


class _Tried(NamedTuple):
    """A prompt's line in the partial file: the rows to write, and what the summary counts."""

    rows: list[dict[str, Any]]
    scored: int  # answers whose rewards did not all abstain
    right: int
    cut_off: int
    tokens: int
    sums: dict[str, list[float]]  # of each reward: sum, and number of answers on which it did not abstain


class Sampler:
    """Samples and judges. `render` is the model's chat template, for prompts that are messages.

    Raises:
        InputError: the settings contradict each other, or a reward is not right.
    """

    def __init__(
        self, llm: LLM, rewards: Sequence[RewardConfig], settings: SampleConfig, params: SamplingParams, render: Render
    ):
        if settings.n > 1 and params.greedy:
            raise InputError(f"--n {settings.n} with temperature 0 samples the same answer {settings.n} times")
        if llm.tokenizer is None:
            raise InputError("sampling needs a tokenizer.json beside the weights")
        self.settings, self.params, self._llm, self._render = settings, params, llm, render
        self._tokenizer = llm.tokenizer
        self.rewards = Rewards(rewards)
        self._configs = tuple(rewards)
        threshold = settings.threshold
        self.threshold = math.fsum(reward.weight for reward in rewards) if threshold is None else threshold

    def run(
        self, prompts: Sequence[Prompt], out: Path, model: str, tell: Callable[[int, int], None] = lambda *_: None
    ) -> dict[str, Any]:
        """Write the accepted answers to `out` as JSON lines; returns the summary.

        model: its name, so that nobody continues with another. tell: called with prompts done and correct answers.

        Raises:
            InputError: `out` exists; or what was begun there had other settings.
        """
        if out.exists():
            raise InputError(f"{out} exists; delete it or choose another --out")
        self.rewards.check(prompts[0].columns)
        partial = out.with_name(f".{out.name}.sampled")
        started = time.monotonic()
        with writing(out), alone(partial, InputError(f"{out} is being written by another process; wait for it")):
            with partial.open("r+b") as file:
                done = _resume(file, self._header(prompts, model), partial)
                fresh = self._sample(prompts, done, file, tell)
            rows = [row for tried in done for row in tried.rows]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            replace_file(out, lines.encode())
            partial.unlink()
        return self._summary(done, fresh, time.monotonic() - started)

    def _sample(
        self, prompts: Sequence[Prompt], done: list[_Tried], file: BinaryIO, tell: Callable[[int, int], None]
    ) -> int:
        """Extend `done` to all prompts, a line each in `file`; returns the tokens sampled."""
        size, tokens = max(1, AT_ONCE // self.settings.n), 0
        tell(len(done), sum(tried.right for tried in done))
        while len(done) < len(prompts):
            first = len(done)
            part = self._try(prompts[first : first + size], first)
            file.write("".join(json.dumps(tried, ensure_ascii=False) + "\n" for tried in part).encode())
            file.flush()
            os.fsync(file.fileno())
            done += part
            tokens += sum(tried.tokens for tried in part)
            tell(len(done), sum(tried.right for tried in done))
        return tokens

    def _try(self, prompts: Sequence[Prompt], first: int) -> list[_Tried]:
        asked, n = [self._asked(prompt) for prompt in prompts], self.settings.n
        params = [
            dataclasses.replace(self.params, n=n, seed=_seed(self.settings.seed, first + number))
            for number in range(len(prompts))
        ]
        outputs = [output.outputs for output in self._llm.generate([one.ids for one in asked], params)]
        choices = [choice for each in outputs for choice in each]
        columns = {name: [p.columns[name] for p in prompts for _ in range(n)] for name in prompts[0].columns}
        shown = [one.prompt for one in asked for _ in range(n)]
        scores = self.rewards.score(shown, [c.text for c in choices], [c.token_ids for c in choices], **columns)
        tried = []
        for number, (prompt, one) in enumerate(zip(prompts, asked, strict=True)):
            own = slice(number * n, number * n + n)
            by_name = {name: values[own] for name, values in scores.by_name.items()}
            tried.append(self._judged(prompt, one, outputs[number], scores.total[own], by_name))
        return tried

    def _asked(self, prompt: Prompt) -> _Asked:
        """The prompt under the system prompt, if there is one."""
        most = self._llm.engine.max_model_len
        if isinstance(prompt.prompt, str):
            if self.settings.system is not None:
                raise InputError("--system takes prompts that are messages; this one is a text")
            return _Asked(prompt.prompt, self._tokenizer.encode(prompt.prompt, most=most), "")
        messages = list(prompt.prompt)
        if self.settings.system is not None:
            if messages[0]["role"] == "system":
                raise InputError("--system was given, but a prompt has a system message of its own")
            messages.insert(0, {"role": "system", "content": self.settings.system})
        text = self._render(messages)  # with its BOS
        bare = text.rstrip()
        opened = f"{_THINK}{text[len(bare) :]}" if bare.endswith(_THINK) else ""
        return _Asked(messages, self._tokenizer.encode(text, add_special_tokens=False, most=most), opened)

    def _judged(
        self,
        prompt: Prompt,
        asked: _Asked,
        choices: Sequence[CompletionOutput],
        totals: Sequence[float | None],
        by_name: dict[str, list[float | None]],
    ) -> _Tried:
        whole = [choice.finish_reason == "stop" for choice in choices]
        right = [
            (choice, total)
            for choice, total, ended in zip(choices, totals, whole, strict=True)
            if ended and total is not None and total >= self.threshold - 1e-9
        ]
        rows = [
            _row(asked.prompt, asked.opened + choice.text, reward=total)
            for choice, total in _kept(right, self.settings.keep)
        ]
        if rows and prompt.original is not None:  # V3's two formats: the problem with its own answer, and with R1's
            rows.insert(0, _row(prompt.prompt, prompt.original))
        sums = {}
        for name, values in by_name.items():
            known = [value for value in values if value is not None]
            sums[name] = [math.fsum(known), float(len(known))]
        scored = sum(total is not None for total in totals)
        tokens = sum(len(choice.token_ids) for choice in choices)
        return _Tried(rows, scored, len(right), whole.count(False), tokens, sums)

    def _header(self, prompts: Sequence[Prompt], model: str) -> dict[str, Any]:
        """What must be the same for a later call to go on."""
        digest = hashlib.sha256(json.dumps(prompts, default=str).encode()).hexdigest()
        params = {name: value for name, value in dataclasses.asdict(self.params).items() if value is not None}
        settings = dataclasses.asdict(self.settings) | {"threshold": self.threshold}
        header = {"model": model, "prompts": digest, **params, **settings, "rewards": reward_tables(self._configs)}
        return dict(json.loads(json.dumps(header, default=str)))

    def _summary(self, done: Sequence[_Tried], fresh: int, seconds: float) -> dict[str, Any]:
        n = self.settings.n
        powers = [2**i for i in range(n.bit_length()) if 2**i <= n]
        sums = {name: [tried.sums[name] for tried in done] for name in done[0].sums}
        means = {name: (math.fsum(s for s, _ in each), sum(c for _, c in each)) for name, each in sums.items()}
        return {
            "prompts": len(done),
            "samples": n * len(done),
            "rows": sum(len(tried.rows) for tried in done),
            "unsolved": sum(not tried.right for tried in done),
            "cut_off": sum(tried.cut_off for tried in done),
            "abstained": sum(n - tried.scored for tried in done),
            "pass_at": {k: pass_at(k, [(t.scored, t.right) for t in done]) for k in dict.fromkeys([*powers, n])},
            "rewards": {name: total / count if count else None for name, (total, count) in means.items()},
            "completion_tokens": sum(tried.tokens for tried in done) / (n * len(done)),
            "seconds": seconds,
            "tokens_per_second": fresh / seconds,
        }

    def close(self) -> None:
        """End the rewards' processes."""
        self.rewards.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pass_at(k: int, counts: Sequence[tuple[int, int]]) -> float | None:
    """The chance that at least one of k answers is right, unbiased (Chen et al. 2021, eq. 1), averaged over prompts.

    counts: answers and right answers of each prompt. Prompts with fewer than k answers do not count; None: all.
    """
    known = [1 - math.comb(n - right, k) / math.comb(n, k) for n, right in counts if n >= k]
    return math.fsum(known) / len(known) if known else None


def _kept(right: Sequence[tuple[CompletionOutput, float]], keep: str) -> list[tuple[CompletionOutput, float]]:
    """Of the accepted answers; of equal ones the first."""
    if keep == "shortest":
        return sorted(right, key=lambda pair: len(pair[0].token_ids))[:1]
    if keep == "first":
        return list(right[:1])
    distinct = {choice.text: (choice, total) for choice, total in reversed(right)}
    return [distinct[text] for text in reversed(distinct)]


def _row(prompt: Any, answer: str, **more: Any) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": answer, **more}
    return {"messages": [*prompt, {"role": "assistant", "content": answer}], **more}


def _seed(seed: int, number: int) -> int:
    """Of the answers to prompt `number`."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=7).digest(), "little")


def _resume(file: BinaryIO, header: dict[str, Any], path: Path) -> list[_Tried]:
    """What earlier calls have done; leaves the file at the end of its last whole line.

    Raises:
        InputError: they had other settings.
    """
    first = file.readline()
    if not first.endswith(b"\n"):
        file.seek(0)
        file.truncate()
        file.write((json.dumps(header) + "\n").encode())
        return []
    before = json.loads(first)
    if changed := next((key for key in header if before.get(key) != header[key]), None):
        was, now = shorten(repr(before.get(changed))), shorten(repr(header[changed]))
        raise InputError(f"{path} was begun with {changed} = {was}, not {now}: go on with that, or delete the file")
    done, end = [], file.tell()
    for line in file:
        if not line.endswith(b"\n"):
            break
        done.append(_Tried(*json.loads(line)))
        end += len(line)
    file.seek(end)
    file.truncate()
    return done
