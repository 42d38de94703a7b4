"""One step on the device: latents into the cache, logits for the rows that need them, tokens, and the next drafts.

The host waits for the tokens, and works out there which drafts they confirm; then for the next drafts.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from leanseek import ops
from leanseek.backends import StepBackend
from leanseek.engine import sampler
from leanseek.engine.outputs import TokenLogprob
from leanseek.engine.sampler import Choice, Rows
from leanseek.engine.sequence import Sequence, Work
from leanseek.machine.memory import empty

PROMPT_LOGPROB_ROWS = 64  # rows whose logits over the whole vocabulary are held at a time


@dataclass
class StepResult:
    """What came of a step."""

    rows: int  # that were computed
    tokens: list[list[int]] = field(default_factory=list)  # per `Rows.sequences`: the accepted drafts and one more
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)  # what may come after them
    logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)  # of `tokens`, where asked for
    sampled_logprobs: dict[Sequence, list[float]] = field(default_factory=dict)  # of `tokens`, where asked for
    prompt_logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)  # of the tokens after the work's
    not_finite: set[Sequence] = field(default_factory=set)  # whose logits hold a NaN or an infinity
    main_seconds: float = 0.0
    draft_seconds: float = 0.0


@dataclass
class _Batch:
    """Works as tensors."""

    works: Listing[Work]
    starts: list[int]  # first row of each work, and the number of rows
    tokens: Tensor  # [N]
    following: Tensor  # [N] the token after each row; anything where it is about to be sampled
    index: ops.CacheIndex


class Runner:
    """A step backend, its cache of `pages` pages, and up to `drafts` MTP drafts a step.

    One page beyond the pool is scratch: rows that no sequence owns lie there.
    """

    def __init__(self, backend: StepBackend, pages: int, page_size: int, drafts: int):
        c = backend.config
        self.backend = backend
        self.page_size = page_size
        self.device = backend.device
        self._drafts = drafts
        self._vocab_size = c.vocab_size
        self._scratch = pages
        layers = c.num_hidden_layers + (1 if drafts else 0)
        shape = (layers, (pages + 1) * page_size, c.cache_width)
        self.cache = empty(shape, backend.dtype, self.device).zero_()

    @torch.inference_mode()
    def run(self, works: Listing[Work], rows: Rows) -> StepResult:
        """Compute the works; `rows` are the sampled rows of those that sample, in their order."""
        clock = _Clock(self.device)
        with ops.row_invariant():
            batch = self._batch(works)
            result = StepResult(batch.starts[-1])
            clock.turn("main")
            hidden = self.backend.step(batch.tokens, self.cache, batch.index)
            clock.turn("host")
            place = None
            if len(rows) < result.rows:  # there are prompts
                self._score_prompts(batch, hidden, result)
                place = self._logit_rows(batch)
            if len(rows):
                clock.turn("main")
                logits = self.backend.logits(hidden if place is None else hidden[place])
                clock.turn("host")
                choice = rows.choice(self._vocab_size, self.device)
                sampled = sampler.choose(sampler.adjust(logits, rows), choice)
                self._collect(rows, logits, sampled, choice, result)
            if self._drafts and any(work.sequence.depth for work in works):
                clock.turn("draft")
                if len(rows):
                    batch.following[slice(None) if place is None else place] = sampled
                result.drafts = self._draft(batch, hidden, rows, result.tokens)
                clock.turn("host")
        result.main_seconds, result.draft_seconds = clock.seconds()
        return result

    # ---- inputs ----

    def _batch(self, works: Listing[Work]) -> _Batch:
        size, width = self.page_size, 1
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths = [0], []
        ahead: list[tuple[int, int]] = []  # rows whose next token is another than the next row's, and that token
        for work in works:
            s = work.sequence
            first, pages = s.computed, s.pages
            if work.samples:
                tokens += s.tokens[first:]
                tokens += s.drafts
            else:
                tokens += s.tokens[first : first + work.count]
                ahead.append((len(tokens) - 1, s.tokens[first + work.count]))
            stop = first + len(tokens) - starts[-1]
            for at in range(first, stop):
                positions.append(at)
                slots.append(pages[at // size] * size + at % size)
            starts.append(len(tokens))
            lengths.append(stop)
            width = max(width, len(pages), (stop + self._drafts) // size + 1)  # drafts write ahead
        following = [*tokens[1:], 0]
        for row, token in ahead:
            following[row] = token
        packed = array("q", [*tokens, *following, *positions, *slots, *starts, *lengths])  # one transfer
        for work in works:
            packed += work.sequence.pages
            packed.extend([self._scratch] * (width - len(work.sequence.pages)))
        n, m = len(tokens), len(works)
        numbers = torch.frombuffer(packed, dtype=torch.int64).to(self.device)
        parts = numbers.split_with_sizes((n, n, n, n, m + 1, m, m * width))
        index = ops.CacheIndex(parts[2], parts[3], parts[4], parts[5], parts[6].view(m, width), size)
        return _Batch(works, starts, parts[0], parts[1], index)

    def _logit_rows(self, batch: _Batch) -> Tensor:
        """Rows [R] whose next token is sampled."""
        rows: list[int] = []
        for work, start in zip(batch.works, batch.starts, strict=False):
            if work.samples:
                rows += range(start + work.count - 1, start + work.rows)
        return torch.tensor(rows, device=self.device)

    # ---- tokens ----

    def _draft(self, batch: _Batch, hidden: Tensor, rows: Rows, tokens: list[list[int]]) -> dict[Sequence, list[int]]:
        """The MTP module over all rows of the step, then on from each speculating sequence's last token.

        The module goes on from the main model's hidden state (eq. 21); for a second draft and later ones the same
        module goes on from its own. What it caches for those is overwritten by the next step.
        """
        hidden = self.backend.step_ahead(1, hidden, batch.following, self.cache, batch.index)
        chosen = sorted((i for i, s in enumerate(rows.sequences) if s.depth), key=lambda i: -rows.sequences[i].depth)
        if not chosen:
            return {}
        sequences, confirmed = [rows.sequences[i] for i in chosen], [len(tokens[i]) - 1 for i in chosen]
        work_of = {work.sequence: i for i, work in enumerate(batch.works)}
        works = [work_of[s] for s in sequences]
        last = [batch.starts[i] + batch.works[i].count - 1 + n for i, n in zip(works, confirmed, strict=True)]
        state = self._picked(hidden, last)
        drafts: list[Tensor] = []
        while True:  # the deepest come first, so that those who go on are a beginning
            choice = self._draft_choice(sequences[: len(state)], len(drafts), confirmed)
            drafts.append(sampler.choose(self.backend.logits(state), choice))
            going = sum(s.depth > len(drafts) for s in sequences)
            if not going:
                break
            ahead = [
                s.computed + last[i] - batch.starts[works[i]] + len(drafts) for i, s in enumerate(sequences[:going])
            ]
            index = self._singles(sequences[:going], ahead, self._picked(batch.index.pages, works[:going]))
            state = self.backend.step_ahead(1, state[:going], drafts[-1][:going], self.cache, index)
        columns = [column.tolist() for column in drafts]  # here the host waits
        return {s: [column[i] for column in columns[: s.depth]] for i, s in enumerate(sequences)}

    def _draft_choice(self, sequences: Listing[Sequence], offset: int, confirmed: Listing[int]) -> Choice | None:
        """How draft `offset` of each is chosen: with the noise of the position it is for, a draft is what the model
        would choose if it thought as its MTP module does."""
        keys = [
            0 if s.greedy else s.key(len(s.tokens) + offset + n + 1) for s, n in zip(sequences, confirmed, strict=False)
        ]
        return Choice.of([s.params for s in sequences], keys, self._vocab_size, self.device)

    def _singles(self, sequences: Listing[Sequence], positions: list[int], pages: Tensor) -> ops.CacheIndex:
        """One new token of each sequence at its position; pages [S, P]."""
        size, n = self.page_size, len(sequences)
        own = [s.pages[at // size] if at // size < len(s.pages) else self._scratch
               for s, at in zip(sequences, positions, strict=True)]  # fmt: skip
        slots = [page * size + at % size for page, at in zip(own, positions, strict=True)]
        packed = array("q", [*positions, *slots, *range(n + 1), *(at + 1 for at in positions)])
        parts = torch.frombuffer(packed, dtype=torch.int64).to(self.device).split([n, n, n + 1, n])
        return ops.CacheIndex(parts[0], parts[1], parts[2], parts[3], pages, size)

    def _picked(self, x: Tensor, rows: list[int]) -> Tensor:
        """Rows of x; one is a view."""
        return x[rows[0] : rows[0] + 1] if len(rows) == 1 else x[torch.tensor(rows, device=self.device)]

    # ---- results ----

    @staticmethod
    def _collect(rows: Rows, logits: Tensor, sampled: Tensor, choice: Choice | None, result: StepResult) -> None:
        tokens, finite = torch.stack((sampled, ops.finite_rows(logits))).tolist()  # here the host waits
        scores: list[float] = []
        if any(s.params.sampled_logprobs for s in rows.sequences):
            temperature = torch.zeros(len(logits), device=logits.device) if choice is None else choice.temperature
            scores = ops.token_logprobs(logits, sampled, temperature).tolist()
        for sequence, first in zip(rows.sequences, rows.first, strict=True):
            stop = first + 1 + (_confirmed(sequence.drafts, tokens, first) if sequence.drafts else 0)
            result.tokens.append(tokens[first:stop])
            if not all(finite[first:stop]):
                result.not_finite.add(sequence)
            if sequence.params.sampled_logprobs:
                result.sampled_logprobs[sequence] = scores[first:stop]
            wanted = sequence.logprobs
            if wanted is not None:
                result.logprobs[sequence] = sampler.logprobs_of(logits[first:stop], sampled[first:stop], wanted)

    def _score_prompts(self, batch: _Batch, hidden: Tensor, result: StepResult) -> None:
        """Log-probabilities of prompt tokens, for the requests that ask: of the token after each row of the work."""
        for work, start in zip(batch.works, batch.starts, strict=False):
            s = work.sequence
            if not s.scores_prompt or (count := min(work.count, s.prompt_length - 1 - s.computed)) <= 0:
                continue
            wanted = s.params.prompt_logprobs or 0
            scores = result.prompt_logprobs[s] = []
            for row in range(start, start + count, PROMPT_LOGPROB_ROWS):
                part = slice(row, min(row + PROMPT_LOGPROB_ROWS, start + count))
                logits = self.backend.logits(hidden[part])
                if not ops.finite_rows(logits).all():
                    result.not_finite.add(s)
                scores += sampler.logprobs_of(logits, batch.following[part], wanted)


def _confirmed(drafts: list[int], tokens: list[int], first: int) -> int:
    """How many drafts are what the model itself chose, tokens from `first` on, up to the one that is not."""
    for i, draft in enumerate(drafts):
        if draft != tokens[first + i]:
            return i
    return len(drafts)


class _Clock:
    """Seconds that the parts of a step took; on CUDA between events, read once the step's results are there."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._turns: list[tuple[str, Any]] = []

    def turn(self, part: str) -> None:
        """From here on, time is `part`'s."""
        self._turns.append((part, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> tuple[float, float]:
        """Seconds of the parts "main" and "draft"."""
        total = {"main": 0.0, "draft": 0.0, "host": 0.0}
        for (part, start), (_, end) in pairwise(self._turns):
            total[part] += (end.synchronize() or start.elapsed_time(end) / 1e3) if self._cuda else end - start
        return total["main"], total["draft"]
