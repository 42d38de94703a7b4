"""One step on the device: latents into the cache, logits for the rows that need them, tokens, and the next drafts.

The host waits once, at the end: which drafts were accepted is worked out where the logits are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanseek import ops
from leanseek.engine import sampler
from leanseek.engine.outputs import TokenLogprob
from leanseek.engine.sampler import Choice, Rows
from leanseek.engine.sequence import Sequence
from leanseek.model import Transformer

PROMPT_LOGPROB_ROWS = 64  # rows whose logits over the whole vocabulary are held at a time


@dataclass
class Work:
    """A sequence's part of a step: `count` known tokens, and its drafts when those are the last known ones."""

    sequence: Sequence
    count: int
    samples: bool = field(init=False)  # whether its last row is to become a token

    def __post_init__(self) -> None:
        self.samples = self.count == self.sequence.remaining

    @property
    def rows(self) -> int:
        return self.count + (len(self.sequence.drafts) if self.samples else 0)


@dataclass
class StepResult:
    """What came of a step."""

    tokens: list[list[int]] = field(default_factory=list)  # per `Rows.sequences`: the accepted drafts and one more
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)  # what may come after them
    logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)  # of `tokens`, where asked for
    prompt_logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)  # of the tokens after the work's
    main_seconds: float = 0.0
    draft_seconds: float = 0.0


@dataclass
class _Batch:
    """Works as tensors."""

    works: Listing[Work]
    starts: list[int]  # first row of each work, and the number of rows
    tokens: Tensor  # [N]
    following: Tensor  # [N] the token after each row; 0 where it is about to be sampled
    index: ops.CacheIndex


class Runner:
    """The model, its cache of `pages` pages, and up to `drafts` MTP drafts a step.

    One page beyond the pool is scratch: rows that no sequence owns lie there.
    """

    def __init__(self, model: Transformer, pages: int, page_size: int, drafts: int):
        c = model.config
        weight = model.embed_tokens.weight
        self.model = model
        model.freeze()
        self.page_size = page_size
        self.device = weight.device
        self._drafts = drafts
        self._vocab_size = c.vocab_size
        self._scratch = pages
        layers = c.num_hidden_layers + (1 if drafts else 0)
        self.cache = torch.zeros(layers, (pages + 1) * page_size, c.cache_width, dtype=weight.dtype, device=self.device)

    @torch.inference_mode()
    def run(self, works: Listing[Work], rows: Rows) -> StepResult:
        """Compute the works; `rows` are the sampled rows of those that sample, in their order."""
        result, clock = StepResult(), _Clock(self.device)
        with ops.row_invariant():
            batch = self._batch(works)
            with clock("main"):
                hidden = self.model.step(batch.tokens, self.cache, batch.index)
            self._score_prompts(batch, hidden, result)
            accepted = None
            if len(rows):
                place = self._logit_rows(batch)
                with clock("main"):
                    logits = self.model.head(hidden[place]).float()
                sampled, accepted = self._sample(logits, rows)
                batch.following[place] = sampled
            if any(work.sequence.speculating for work in works):
                with clock("draft"):
                    result.drafts = self._draft(batch, hidden, rows, accepted)
            if accepted is not None:
                self._collect(rows, logits, sampled, accepted, result)
        result.main_seconds, result.draft_seconds = clock.seconds("main"), clock.seconds("draft")
        return result

    # ---- inputs ----

    def _batch(self, works: Listing[Work]) -> _Batch:
        tokens: list[int] = []
        following: list[int] = []
        counts = np.array([work.rows for work in works])
        computed = np.array([work.sequence.computed for work in works])
        width = int((computed + counts).max() + self._drafts) // self.page_size + 1  # drafts write ahead
        pages = np.full((len(works), width), self._scratch)
        for i, work in enumerate(works):
            s, stop = work.sequence, work.sequence.computed + work.count
            tokens += s.tokens[s.computed : stop]
            following += s.tokens[s.computed + 1 : stop + 1]
            if work.samples:
                tokens += s.drafts
                following += [0] * (len(s.drafts) + 1)
            pages[i, : len(s.pages)] = s.pages
        starts = np.concatenate(([0], counts.cumsum()))
        owner = np.repeat(np.arange(len(works)), counts)
        positions = np.arange(len(tokens)) - (starts[:-1] - computed)[owner]
        slots = pages[owner, positions // self.page_size] * self.page_size + positions % self.page_size
        parts = [np.array(tokens), np.array(following), positions, slots, starts, computed + counts, pages.ravel()]
        packed = torch.from_numpy(np.concatenate(parts)).to(self.device)  # one transfer
        t, f, p, sl, st, le, pa = packed.split([len(part) for part in parts])
        index = ops.CacheIndex(p, sl, st, le, pa.view(len(works), width), self.page_size)
        return _Batch(works, starts.tolist(), t, f, index)

    def _logit_rows(self, batch: _Batch) -> Tensor:
        """Rows [R] whose next token is sampled."""
        rows: list[int] = []
        for work, start in zip(batch.works, batch.starts, strict=False):
            if work.samples:
                rows += range(start + work.count - 1, start + work.rows)
        return torch.tensor(rows, device=self.device)

    # ---- tokens ----

    def _sample(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Tokens [R] of the sampled rows, and how many drafts [S] of each sequence they confirm."""
        params = [rows.sequences[i].params for i in rows.row_sequence]
        choice = Choice.of(params, rows.keys, logits.shape[1], self.device)
        sampled = sampler.choose(sampler.adjust(logits, rows), choice)
        most = max(len(s.drafts) for s in rows.sequences)
        if not most:
            return sampled, torch.zeros_like(sampled)
        proposed = torch.tensor([s.drafts + [-1] * (most - len(s.drafts)) for s in rows.sequences], device=self.device)
        first = torch.tensor(rows.first, device=self.device)
        places = first[:, None] + torch.arange(most, device=self.device)
        confirmed = sampled[places.clamp_max(len(sampled) - 1)] == proposed
        return sampled, confirmed.long().cumprod(1).sum(1)

    def _draft(self, batch: _Batch, hidden: Tensor, rows: Rows, accepted: Tensor | None) -> dict[Sequence, list[int]]:
        """The MTP module over all rows of the step, then on from each speculating sequence's last token.

        The module goes on from the main model's hidden state (eq. 21); for a second draft and later ones the same
        module goes on from its own. What it caches for those is overwritten by the next step.
        """
        hidden = self.model.step_ahead(1, hidden, batch.following, self.cache, batch.index)
        place = {work.sequence: i for i, work in enumerate(batch.works)}
        chosen = [i for i, s in enumerate(rows.sequences) if s.speculating]
        if accepted is None or not chosen:
            return {}
        sequences = [rows.sequences[i] for i in chosen]
        confirmed = accepted[torch.tensor(chosen, device=self.device)]
        works = torch.tensor([place[s] for s in sequences], device=self.device)
        first = [batch.starts[place[s]] + batch.works[place[s]].count - 1 for s in sequences]
        last = torch.tensor(first, device=self.device) + confirmed
        state, positions, pages = hidden[last], batch.index.positions[last], batch.index.pages[works]
        choice, keys = self._draft_choice(sequences)
        drafts: list[Tensor] = []
        while True:
            if choice is not None:
                choice.keys = keys.gather(1, confirmed[:, None] + len(drafts)).squeeze(1)
            drafts.append(sampler.choose(self.model.head(state).float(), choice))
            if len(drafts) == self._drafts:
                return dict(zip(sequences, torch.stack(drafts, 1).tolist(), strict=True))
            positions = positions + 1
            state = self.model.step_ahead(1, state, drafts[-1], self.cache, self._singles(positions, pages))

    def _draft_choice(self, sequences: Listing[Sequence]) -> tuple[Choice | None, Tensor]:
        """How drafts are chosen, and the keys [S, 2k] of the positions they may be for: with those of the position
        itself, a draft is what the model would choose if it thought as its MTP module does."""
        choice = Choice.of([s.params for s in sequences], [0] * len(sequences), self._vocab_size, self.device)
        if choice is None:
            return None, torch.empty(0)
        ahead = range(1, 2 * self._drafts + 1)
        return choice, sampler.as_keys([[s.key(len(s.tokens) + i) for i in ahead] for s in sequences], self.device)

    def _singles(self, positions: Tensor, pages: Tensor) -> ops.CacheIndex:
        """One new token at `positions` [S] of each sequence with `pages` [S, P]."""
        page = pages.gather(1, (positions // self.page_size)[:, None]).squeeze(1)
        slots = page * self.page_size + positions % self.page_size
        offsets = torch.arange(len(positions) + 1, device=self.device)
        return ops.CacheIndex(positions, slots, offsets, positions + 1, pages, self.page_size)

    # ---- results ----

    def _collect(self, rows: Rows, logits: Tensor, sampled: Tensor, accepted: Tensor, result: StepResult) -> None:
        tokens, confirmed = sampled.tolist(), accepted.tolist()  # here the host waits
        for sequence, first, count in zip(rows.sequences, rows.first, confirmed, strict=True):
            kept = slice(first, first + count + 1)
            result.tokens.append(tokens[kept])
            if sequence.params.logprobs is not None:
                values = sampler.logprobs_of(logits[kept], sampled[kept], sequence.params.logprobs)
                result.logprobs[sequence] = values

    def _score_prompts(self, batch: _Batch, hidden: Tensor, result: StepResult) -> None:
        """Log-probabilities of prompt tokens, for the requests that ask: of the token after each row of the work."""
        for work, start in zip(batch.works, batch.starts, strict=False):
            s = work.sequence
            wanted = s.params.prompt_logprobs
            count = min(work.count, s.prompt_length - 1 - s.computed)
            if wanted is None or not s.scores_prompt or count <= 0:
                continue
            scores = result.prompt_logprobs[s] = []
            for row in range(start, start + count, PROMPT_LOGPROB_ROWS):
                part = slice(row, min(row + PROMPT_LOGPROB_ROWS, start + count))
                logits = self.model.head(hidden[part]).float()
                scores += sampler.logprobs_of(logits, batch.following[part], wanted)


class _Clock:
    """Seconds spent in named parts of a step; on CUDA between events, read once the step's results are there."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, name: str) -> float:
        spans = [(start, end) for n, start, end in self._spans if n == name]
        if not self._cuda:
            return sum(end - start for start, end in spans)
        return sum(end.synchronize() or start.elapsed_time(end) / 1e3 for start, end in spans)
