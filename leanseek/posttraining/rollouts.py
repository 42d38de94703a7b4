"""Rollouts: groups of completions from our engine, in the same process, on the weights being trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from leanseek.engine import LLM, Engine, SamplingParams, Tokenizer
from leanseek.engine.sequence import mix
from leanseek.posttraining.policy import Policy


@dataclass(frozen=True)
class Prompt:
    text: str  # as a reward reads it
    token_ids: tuple[int, ...]  # as the model does
    columns: dict[str, Any] = field(default_factory=dict)  # the row's others, for rewards


@dataclass(frozen=True)
class Completion:
    token_ids: tuple[
        int, ...
    ]  # as sampled, with the end token if it came: these are trained on, never text made of them
    logprobs: tuple[float, ...]  # of each when it was sampled, after temperature
    text: str
    cut_off: bool  # the limit ended it


def seed_of(seed: int, step: int, prompt: int) -> int:
    """The seed of a request: of the run's seed, the step and the prompt's place in it. The engine mixes each choice's
    number into it."""
    return mix(mix(seed, step), prompt)


class Sampler:
    """An engine over a policy. What it has cached goes as soon as the weights have changed.

    options: the engine's.
    """

    def __init__(self, policy: Policy, tokenizer: Tokenizer | None, ends: Sequence[int] = (), **options: Any):
        self.policy, self._backend = policy, policy.backend()
        # nobody waits for a first token: steps may last
        settings = {"step_seconds": 60.0} | options
        self.engine = Engine(self._backend, tokenizer, eos_token_ids=ends, **settings)
        self._llm = LLM(self.engine)

    def complete(
        self, prompts: Sequence[Prompt], choices: int, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """`choices` completions of each prompt, sampled from softmax(logits / temperature), greedy at 0.

        They depend on the weights and on seeds (one a prompt), not on each other.
        """
        self.refresh()
        each = SamplingParams(
            n=choices,
            temperature=temperature,
            max_tokens=max_tokens,
            sampled_logprobs=True,
            skip_special_tokens=False,  # a reward may look for <think>; the end token is no text in any case
        )
        params = [dataclasses.replace(each, seed=seed) for seed in seeds]
        outputs = self._llm.generate([prompt.token_ids for prompt in prompts], params)
        return [
            [
                Completion(tuple(o.token_ids), tuple(o.sampled_logprobs), o.text, o.finish_reason == "length")
                for o in output.outputs
            ]
            for output in outputs
        ]

    def refresh(self) -> None:
        """Take the weights as they are now."""
        backend = self.policy.backend()
        if backend is not self._backend:
            self.engine.adopt(backend)
            self._backend = backend
