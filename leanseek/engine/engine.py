"""The engine: requests in, steps, deltas out. One thread, no clocks in its decisions about tokens.

A step: the scheduler says what runs (scheduler.py), the runner computes it (runner.py), and each sequence takes its
tokens: stop conditions, text, pages that are now full. What goes wrong in one sequence's part ends that sequence.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Sequence as Listing
from threading import Thread
from typing import Any, ClassVar

from leanseek.backends import StepBackend
from leanseek.engine.guidance import Grammars, GuideFailed, Matcher
from leanseek.engine.outputs import Delta, EngineStats, FinishReason
from leanseek.engine.pages import PagePool
from leanseek.engine.params import EngineError, SamplingParams
from leanseek.engine.runner import Runner, StepResult
from leanseek.engine.sampler import Rows
from leanseek.engine.scheduler import Scheduler
from leanseek.engine.sequence import Request, Sequence, Work, seed_of
from leanseek.engine.speculation import Speculation
from leanseek.engine.tokenizer import TextStream, Tokenizer

log = logging.getLogger(__name__)

PRIORITY_SECONDS = 30.0  # one priority level is worth as much as having come that much earlier
MIN_STEP_ROWS = 64
DRAFTS = 3  # at most; how many pay is found out for each request (speculation.py)
GIB = 2**30
NOT_FINITE = "the model's logits are not finite: a weight is NaN or infinite, or its values overflow"


class Engine:
    """Continuous batching over one network, which `backend` computes.

    cache_gib: of the latent cache, never exceeded. max_model_len: prompt and output of a request together; as much as
    the model and the cache allow when None. step_tokens: the most rows in a step. step_seconds: how long a step with
    prompts in it should last, so that newcomers are heard. speculate: the most MTP drafts of a request in a step, None
    for DRAFTS if the model has an MTP module. seed: of the requests that bring none.

    Raises:
        EngineError: options that cannot be, or a forked process (see `check_process`).
    """

    _process: ClassVar[int | None] = None  # where the first engine was made

    def __init__(
        self,
        backend: StepBackend,
        tokenizer: Tokenizer | None = None,
        *,
        defaults: dict[str, Any] | None = None,
        eos_token_ids: Listing[int] = (),
        cache_gib: float = 1.0,
        page_size: int = 16,
        max_model_len: int | None = None,
        max_batch: int = 64,
        step_tokens: int = 512,
        step_seconds: float = 0.1,
        speculate: int | None = None,
        prefix_cache: bool = True,
        seed: int | None = None,
    ):
        self.check_process()
        Engine._process = os.getpid()
        config = backend.config
        ahead = bool(config.num_nextn_predict_layers)
        drafts = DRAFTS * ahead if speculate is None else speculate
        if min(page_size, max_batch, step_tokens) < 1 or drafts < 0:
            raise EngineError("page_size, max_batch and step_tokens must be at least 1, speculate at least 0")
        if drafts and not ahead:
            raise EngineError("speculate needs a model with an MTP module; this one has none")
        self.config = config
        self.tokenizer = tokenizer
        self.copying: Thread | None = (
            None  # writes the packed copy (backends/packed_copy.py); nothing here waits for it
        )
        self.defaults = defaults or {}
        self.eos_token_ids = frozenset(eos_token_ids or config.eos_token_ids)
        width = config.cache_width * backend.dtype.itemsize
        self.kv_bytes_per_token = width * config.num_hidden_layers
        page_bytes = width * (config.num_hidden_layers + bool(drafts)) * page_size
        pages = int(cache_gib * GIB) // page_bytes - 1  # the runner has one of its own
        self.max_batch = max_batch
        self.max_model_len = self._context(max_model_len, pages * page_size)
        self._pool = PagePool(pages, page_size, prefix_cache)
        self._scheduler = Scheduler(self._pool, max_batch)
        self._runner = Runner(backend, pages, page_size, drafts)
        self._speculation = Speculation(drafts)
        self._grammars = Grammars(tokenizer, config.vocab_size, sorted(self.eos_token_ids)) if tokenizer else None
        self._step_tokens = step_tokens
        self._step_goal = step_seconds
        self._row_seconds = 0.0  # running mean, of steps with prompts in them
        self._fresh = random.Random(seed)
        self._sequences: dict[str, list[Sequence]] = {}  # unfinished, by request
        self._serial = 0
        self._finished: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._steps = self._generated = 0
        self._forward_seconds = self._step_seconds = 0.0
        self._told: list[Delta] = []  # of requests that ended between steps

    def _context(self, wanted: int | None, cached_tokens: int) -> int:
        limit = min(self.config.max_position_embeddings, cached_tokens)
        if limit < 2:
            raise EngineError(
                f"cache_gib is too small: {max(0, cached_tokens)} tokens of {self.kv_bytes_per_token} bytes fit"
            )
        if wanted is not None and not 2 <= wanted <= limit:
            raise EngineError(
                f"max_model_len must lie between 2 and {limit}: the model goes to {self.config.max_position_embeddings}"
                f" tokens, the cache to {cached_tokens} (see cache_gib)"
            )
        return wanted or limit

    def adopt(self, backend: StepBackend) -> None:
        """Go on with other weights of the same network; what was cached of the old ones is found no more.

        Raises:
            EngineError: requests are running, whose cache is of the old weights; or it is another network.
        """
        if self.has_work():
            raise EngineError("new weights while requests are running: let them end, or abort them")
        if backend.config != self.config or backend.dtype != self._runner.backend.dtype:
            raise EngineError("the new weights are of another network or dtype")
        self._runner.backend = backend
        self._pool.clear()

    # ---- requests ----

    @classmethod
    def check_process(cls) -> None:
        """Raises EngineError in a process that was forked from one with an engine: OpenMP's threads stayed there, and
        the first parallel loop would wait for them for ever."""
        if cls._process not in (None, os.getpid()):
            raise EngineError(
                f"this process was forked from process {cls._process}, which has an engine, and cannot run one; "
                'start it with multiprocessing\'s "spawn" method and make its LLM there'
            )

    def check(self, prompt: Listing[int], params: SamplingParams) -> None:
        """Whether the engine can serve it; may be called from any thread.

        Raises:
            EngineError: it never could; the message says why.
        """
        self.check_process()
        vocabulary = self.config.vocab_size
        if not prompt:
            raise EngineError("the prompt is empty")
        if len(prompt) >= self.max_model_len:
            raise EngineError(
                f"the prompt has {len(prompt)} tokens; the context is {self.max_model_len}, answer included"
            )
        if params.max_tokens is not None and len(prompt) + params.max_tokens > self.max_model_len:
            asked = f"{len(prompt)} prompt tokens and max_tokens = {params.max_tokens}"
            raise EngineError(f"{asked} exceed the context of {self.max_model_len} tokens")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise EngineError(f"a prompt token lies outside the vocabulary of {vocabulary}")
        ids = [*(params.logit_bias or {}), *(params.stop_token_ids or ())]
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise EngineError(f"a token id of logit_bias or stop_token_ids lies outside the vocabulary of {vocabulary}")
        if self._grammars is None and (params.stop or params.guided):
            raise EngineError("stop strings and guided output need a tokenizer.json beside the model")

    def matcher(self, params: SamplingParams) -> Matcher | None:
        """The compiled guide of a request, if it has one; may take seconds, and be called from any thread.

        Raises:
            EngineError: the guide is not valid, or takes too much to compile.
            Crowded: many such guides are being compiled.
        """
        return self._grammars.compile(params.guided) if params.guided and self._grammars else None

    def add(self, request: Request) -> None:
        """Queue a request. A guide that came without its matcher is compiled here and now.

        Raises:
            EngineError: it can never be served, or its guide is not valid.
        """
        params, prompt = request.params, request.prompt_token_ids
        self.check(prompt, params)
        if request.request_id in self._sequences:
            raise EngineError(f"request {request.request_id!r} is already running")
        matcher = request.matcher or self.matcher(params)
        room = self.max_model_len - len(prompt)
        choices: list[Sequence] = []
        self._serial += 1
        for index in range(params.n):
            text = None
            if self.tokenizer:
                text = TextStream(
                    self.tokenizer,
                    params.stop_strings,
                    params.skip_special_tokens,
                    params.include_stop_str_in_output,
                    params.spans,
                )
            sequence = Sequence(
                request=request,
                index=index,
                order=(request.arrived + request.priority * PRIORITY_SECONDS, self._serial, index),
                seed=seed_of(params, index, self._fresh),
                max_tokens=room if params.max_tokens is None else params.max_tokens,
                leader=choices[0] if choices else None,
                text=text,
                matcher=matcher.copy() if matcher else None,
                ends=frozenset(params.stop_token_ids or ())
                | (frozenset() if params.ignore_eos else self.eos_token_ids),
            )
            self._speculation.begin(sequence, len(self._scheduler.running) + 1)
            choices.append(sequence)
            self._scheduler.add(sequence)
        self._sequences[request.request_id] = choices
        self._totals["requests"] += 1
        self._totals["prompt_tokens"] += len(prompt)

    def abort(self, request_id: str) -> None:
        """End a request now; its pages are free. Its choices' last deltas come with the next step."""
        for sequence in list(self._sequences.get(request_id, ())):
            self._told.append(self._finish(sequence, "abort"))

    def serves(self, request_id: str) -> bool:
        """Whether a request has choices that have not ended."""
        return request_id in self._sequences

    def has_work(self) -> bool:
        return bool(self._sequences or self._told)

    # ---- a step ----

    def step(self) -> list[Delta]:
        """Run one step; what it added, choice by choice."""
        start = time.perf_counter()
        deltas, self._told = self._told, []
        works = self._scheduler.schedule(self._budget(), self._step_tokens)
        for work in works:
            if not work.sequence.scheduled:
                work.sequence.scheduled = time.monotonic()
        if self._speculation.probes(len(works)) and all(work.count == 1 and work.samples for work in works):
            for work in works:
                work.sequence.drafts.clear()
        self._run(works, deltas)
        self._steps += 1
        self._step_seconds += time.perf_counter() - start
        return deltas

    def _run(self, works: list[Work], deltas: list[Delta]) -> None:
        """Run works, and let their sequences take what came of it; what goes wrong ends the sequence it belongs to."""
        start = time.perf_counter()
        rows = Rows()
        for work in works:
            try:
                if work.samples:
                    rows.add(work.sequence)
            except Exception as error:
                deltas.append(self._fail(work.sequence, error))
        works = [work for work in works if work.sequence.finish_reason is None]
        if not works:
            return
        try:
            result = self._runner.run(works, rows)
        except Exception as error:
            if len(works) == 1:
                deltas.append(self._fail(works[0].sequence, error))
                return
            for work in works:  # each alone: only one shall end
                self._run([work], deltas)
            return
        sampled = iter(result.tokens)
        for work in works:
            tokens = next(sampled) if work.samples else None
            if work.sequence in result.not_finite:
                log.error("request %s failed: %s", work.sequence.request_id, NOT_FINITE)
                deltas.append(self._finish(work.sequence, "error", error=NOT_FINITE))
                continue
            try:
                if tokens is not None:
                    deltas.append(self._take(work.sequence, tokens, result, len(works)))
                else:
                    self._advance(work, result)
            except Exception as error:
                deltas.append(self._fail(work.sequence, error))
        self._measure(len(works), rows, result, time.perf_counter() - start)

    def _advance(self, work: Work, result: StepResult) -> None:
        """A part of a prompt is in the cache."""
        s = work.sequence
        self._take_prompt_logprobs(s, result)
        s.computed += work.count
        self._register_pages(s)

    def _take(self, s: Sequence, tokens: list[int], result: StepResult, batch: int) -> Delta:
        """All known tokens are in the cache; sampled ones up to the end become the sequence's."""
        self._take_prompt_logprobs(s, result)
        if s.drafts:
            self._speculation.judge(s, len(tokens) - 1, batch)
        if not s.first_token:
            s.first_token = time.monotonic()
        end, count = None, 0
        thought = s.text.reasoning_tokens if s.text else 0
        for token in tokens:
            s.tokens.append(token)
            count += 1
            end = self._end(s, token)
            if end:
                break
        del tokens[count:]
        self._generated += count
        s.computed = len(s.tokens) - 1  # accepted drafts are in the cache; the last token is not
        if s.depth:
            s.drafts = result.drafts.get(s, [])[: s.max_tokens - s.output_length - 1]
        elif s.drafts:
            s.drafts = []
        self._register_pages(s)
        text = s.text.take(final=end is not None) if s.text else ""
        delta = Delta(s.request_id, s.index, tokens, text)
        if s.text:
            delta.reasoning_tokens = s.text.reasoning_tokens - thought
        if result.logprobs and s in result.logprobs:
            delta.logprobs = result.logprobs[s][:count]
        if s.params.sampled_logprobs:
            delta.sampled_logprobs = result.sampled_logprobs[s][:count]
        if s.prompt_logprobs:
            delta.prompt_logprobs, s.prompt_logprobs = s.prompt_logprobs, []
        if end:
            last = self._finish(s, *end)
            delta.finish_reason, delta.stop_reason = last.finish_reason, last.stop_reason
            delta.usage, delta.timing = last.usage, last.timing
        return delta

    def _take_prompt_logprobs(self, s: Sequence, result: StepResult) -> None:
        if s not in result.prompt_logprobs:
            return
        s.prompt_logprobs = s.prompt_logprobs or [None]  # nothing comes before the first token
        for place, each in enumerate(result.prompt_logprobs[s], start=s.computed + 1):
            if place == len(s.prompt_logprobs):  # else known from before a preemption
                s.prompt_logprobs.append(each)

    def _end(self, s: Sequence, token: int) -> tuple[FinishReason, int | str | None] | None:
        """Take the token's text; why the sequence ends with it, if it does."""
        if s.matcher:
            s.matcher.advance(token)
        if token in s.ends:
            return "stop", None if token in self.eos_token_ids and not s.params.ignore_eos else token
        length = s.output_length
        matched = s.text.add(token, length >= s.min_tokens) if s.text else None
        if matched is not None:
            return "stop", matched
        if s.matcher and s.matcher.finished:
            return "stop", None
        return ("length", None) if length >= s.max_tokens else None

    def _register_pages(self, s: Sequence) -> None:
        """Make the pages that are now full findable by their tokens."""
        size = self._pool.page_size
        while (s.registered + 1) * size <= s.computed:
            start = s.registered * size
            s.serial = self._pool.register(s.pages[s.registered], s.serial, s.tokens[start : start + size])
            s.registered += 1

    # ---- ends ----

    def _fail(self, sequence: Sequence, error: Exception) -> Delta:
        if isinstance(error, GuideFailed):
            return self._finish(sequence, "error", error=str(error), refused=True)
        log.error("request %s failed", sequence.request_id, exc_info=error)
        return self._finish(sequence, "error", error=f"{type(error).__name__}: {error}")

    def _finish(
        self,
        s: Sequence,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: str | None = None,
        refused: bool = False,
    ) -> Delta:
        """End a sequence; its last delta."""
        s.finish_reason = reason
        self._scheduler.remove(s)
        choices = self._sequences[s.request_id]
        choices.remove(s)
        if not choices:
            del self._sequences[s.request_id]
        self._finished[reason] += 1
        self._totals["cached_tokens"] += s.cached_tokens
        delta = s.delta(time.monotonic())
        delta.stop_reason, delta.error, delta.refused = stop_reason, error, refused
        return delta

    # ---- measures ----

    def _budget(self) -> int:
        """Rows that a step should have: as many as take `step_seconds`."""
        if not self._row_seconds:
            return min(self._step_tokens, 2 * MIN_STEP_ROWS)
        return min(self._step_tokens, max(MIN_STEP_ROWS, int(self._step_goal / self._row_seconds)))

    def _measure(self, works: int, rows: Rows, result: StepResult, seconds: float) -> None:
        self._forward_seconds += result.main_seconds + result.draft_seconds
        if len(rows) == result.rows:  # it only decoded
            self._speculation.measured(works, len(rows) - works, seconds, result.draft_seconds)
        else:
            each = seconds / result.rows
            self._row_seconds += (each - self._row_seconds) * (0.2 if self._row_seconds else 1.0)

    def stats(self) -> EngineStats:
        totals = self._totals
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_total=self._pool.pages,
            pages_used=self._pool.pages - self._pool.available,
            pages_cached=self._pool.cached,
            page_size=self._pool.page_size,
            cache_bytes=self._runner.cache.nbytes,
            requests=totals["requests"],
            finished=dict(self._finished),
            preemptions=self._scheduler.preemptions,
            prompt_tokens=totals["prompt_tokens"],
            cached_tokens=totals["cached_tokens"],
            generated_tokens=self._generated,
            steps=self._steps,
            forward_seconds=self._forward_seconds,
            step_seconds=self._step_seconds,
            draft_tokens=list(self._speculation.proposed),
            accepted_tokens=list(self._speculation.accepted),
        )

    def check_invariants(self) -> None:
        """The books agree with each other. Run at start-up, and after every step in tests.

        Raises:
            AssertionError: they do not.
        """
        running, waiting = self._scheduler.running, self._scheduler.waiting
        self._pool.check(s.pages for s in running)
        everyone = {s for choices in self._sequences.values() for s in choices}
        assert everyone == {*running, *waiting}, "a sequence is lost"
        assert len(everyone) == len(running) + len(waiting), "a sequence runs and waits"
        assert all(not s.pages and not s.computed and not s.drafts for s in waiting), "a waiting sequence holds pages"
        for s in running:
            assert 0 <= s.computed < len(s.tokens), "a running sequence has nothing to compute"
            assert len(s.pages) * self._pool.page_size >= s.computed, "computed tokens without a page"
            assert s.registered * self._pool.page_size <= s.computed, "a registered page is not full"
            assert s.output_length < s.max_tokens, "a sequence is past its end"
        assert running == sorted(running, key=lambda s: s.order), "running sequences are out of order"
