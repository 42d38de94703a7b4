"""Rollouts: groups of completions from our engine, in the same process, on the weights being trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from leanseek.engine import LLM, Engine, SamplingParams, Tokenizer
from leanseek.engine.sequence import mix
from leanseek.posttraining.policy import Policy


class Completion(NamedTuple):
    token_ids: list[int]  # as sampled, with the end token if it came: these are trained on, never ids made of a text
    logprobs: list[float]  # of each when it was sampled, after temperature
    text: str  # special tokens such as <think> included, the end token not
    cut_off: bool  # the limit ended it


def seed_of(seed: int, step: int, prompt: int) -> int:
    """The seed of a prompt's completions, of the run's seed, the step and the prompt's place in it. The engine mixes
    each choice's number into it."""
    return mix(mix(seed, step), prompt)


class Rollouts:
    """An engine over a policy. What it has cached goes as soon as the weights have changed.

    ends: tokens that end a completion, besides the model's. options: the engine's.
    """

    def __init__(self, policy: Policy, tokenizer: Tokenizer | None, ends: Sequence[int] = (), **options: Any):
        self.policy, self._backend = policy, policy.backend()
        # nobody waits for a first token: steps may last
        self.engine = Engine(self._backend, tokenizer, eos_token_ids=ends, **{"step_seconds": 60.0} | options)
        self._llm = LLM(self.engine)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        choices: int,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        stop: Sequence[str] = (),
        keep: bool = False,
    ) -> list[list[Completion]]:
        """`choices` completions of each prompt, sampled from softmax(logits / temperature), greedy at 0.

        They depend on the weights, the prompt and its seed, and not on each other. keep: the policy keeps what they
        went through, for training on them.
        """
        self.refresh(keep)
        each = SamplingParams(
            n=choices,
            temperature=temperature,
            max_tokens=max_tokens,
            stop=stop,
            sampled_logprobs=True,
            skip_special_tokens=False,
        )
        params = [dataclasses.replace(each, seed=seed) for seed in seeds]
        outputs = self._llm.generate(prompts, params)
        return [
            [Completion(o.token_ids, o.sampled_logprobs, o.text, o.finish_reason == "length") for o in output.outputs]
            for output in outputs
        ]

    def refresh(self, keep: bool = False) -> None:
        """Take the weights as they are now."""
        backend = self.policy.recorder() if keep else self.policy.backend()
        if backend is not self._backend:
            self.engine.adopt(backend)
            self._backend = backend
