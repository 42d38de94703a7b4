"""A request, its sequences (one per choice), and their parts of a step."""

from __future__ import annotations

import random
import time
from array import array
from dataclasses import dataclass, field

from leanseek.engine.guidance import Matcher
from leanseek.engine.outputs import Delta, FinishReason, Timing, TokenLogprob, Usage
from leanseek.engine.params import SamplingParams
from leanseek.engine.penalties import Penalties
from leanseek.engine.tokenizer import TextStream

_MASK = 2**64 - 1


def mix(a: int, b: int) -> int:
    """Two numbers hashed into 64 bits (splitmix64), to derive independent streams of random numbers."""
    z = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass(frozen=True)
class Request:
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first
    arrived: float = field(default_factory=time.monotonic)
    matcher: Matcher | None = None  # of `params.guided`, at its start


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice in progress: its tokens, how many of them are in the cache, and its text."""

    request: Request
    index: int
    order: tuple[float, int, int]  # lower runs first; fixed at arrival, so nobody waits forever
    seed: int
    max_tokens: int
    leader: Sequence | None  # choice 0, whose prompt pages this choice shares
    text: TextStream | None
    matcher: Matcher | None
    ends: frozenset[int] = frozenset()  # tokens that complete the sequence
    tokens: list[int] = field(init=False)  # prompt and output
    prompt_length: int = field(init=False)
    params: SamplingParams = field(init=False)
    # Copies of what a step reads of each sequence: after a forward, other objects are no longer in the CPU's cache.
    request_id: str = field(init=False)
    greedy: bool = field(init=False)
    penalties: Penalties | None = field(init=False)  # and biases, if there are any
    adjusts: bool = field(init=False)  # logits are changed before sampling
    min_tokens: int = field(init=False)
    logprobs: int | None = field(init=False)
    scores_prompt: bool = field(init=False)  # returns logprobs of the prompt, so all of it is computed
    computed: int = 0  # tokens whose latents are in the cache
    pages: array[int] = field(default_factory=lambda: array("q"))  # an array, since the step's tensors are made from it
    registered: int = 0  # pages findable by their tokens
    serial: int = 0  # of the last registered page
    drafts: list[int] = field(default_factory=list)  # proposed tokens after `tokens`
    depth: int = 0  # drafts per step; 0 is final, because the MTP module's cache falls behind
    chances: list[float] = field(default_factory=list)  # acceptance rate of each draft if those before it were right
    trials: int = 0  # steps that verified drafts
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    scheduled: float = 0.0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.params = self.request.params
        self.tokens = list(self.request.prompt_token_ids)
        self.prompt_length = len(self.tokens)
        self.request_id, self.greedy = self.request.request_id, self.params.greedy
        adjusts = self.params.adjusts
        self.penalties = Penalties(self.params, self.tokens, self.ends) if adjusts else None
        self.adjusts = adjusts or self.matcher is not None
        self.min_tokens, self.logprobs = self.params.min_tokens, self.params.logprobs
        self.scores_prompt = self.params.prompt_logprobs is not None and self.index == 0

    @property
    def remaining(self) -> int:
        """Known tokens not yet in the cache: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def prefilled(self) -> bool:
        return self.computed >= self.prompt_length

    def key(self, position: int) -> int:
        """The 64-bit random number for the token at a position; depends on nothing but the seed and the position."""
        return mix(self.seed, position)

    def usage(self) -> Usage:
        return Usage(
            self.prompt_length, self.cached_tokens, self.output_length, self.draft_tokens, self.accepted_tokens
        )

    def delta(self, finished: float = 0.0) -> Delta:
        """An empty delta, with usage and timing once finished."""
        delta = Delta(self.request_id, self.index, finish_reason=self.finish_reason)
        if self.finish_reason is not None:
            delta.usage = self.usage()
            delta.timing = Timing(self.request.arrived, self.scheduled, self.first_token, finished)
        return delta


@dataclass(slots=True)
class Work:
    """A sequence's part of a step: `count` known tokens, and its drafts if these are the last known tokens."""

    sequence: Sequence
    count: int
    samples: bool  # whether these are the last known tokens, so the last row samples the next one

    @property
    def rows(self) -> int:
        return self.count + (len(self.sequence.drafts) if self.samples else 0)


def seed_of(params: SamplingParams, index: int, fresh: random.Random) -> int:
    """The seed of choice `index`, from the request's seed or a random one."""
    return mix(fresh.getrandbits(64) if params.seed is None else params.seed & _MASK, index)
