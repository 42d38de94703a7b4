"""What every evaluation needs from a model: the likelihood of a continuation, and generated text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from leanseek.engine import LLM, SamplingParams, Tokenizer
from leanseek.errors import InputError

AT_ONCE = 256  # requests handed to the engine together: their results are held until all have ended
MAX_STOPS = 64  # what SamplingParams takes


class Score(NamedTuple):
    """A continuation's log-probability, and whether it is what greedy decoding would say."""

    logprob: float
    greedy: bool


class Ask(NamedTuple):
    """A prompt, what ends its answer, and how its tokens are chosen where that is not greedily."""

    prompt: str
    stops: Sequence[str]
    max_tokens: int
    sampling: dict[str, Any] | None = None


class Scorer:
    """Log-likelihoods and answers of a model with a tokenizer.

    Raises:
        InputError: the model has no tokenizer.
    """

    def __init__(self, llm: LLM):
        if llm.tokenizer is None:
            raise InputError("evaluation needs a tokenizer.json beside the weights")
        self._llm = llm
        self.tokenizer: Tokenizer = llm.tokenizer
        self.max_length = llm.engine.max_model_len - 1  # tokens of a prompt

    @property
    def end_token_id(self) -> int:
        return min(self._llm.engine.eos_token_ids, default=0)

    @property
    def prefix_token_id(self) -> int:
        """The stand-in for an empty context: the BOS token, or EOS if there is no BOS."""
        bos = self._llm.engine.config.bos_token_id
        return self.end_token_id if bos is None else bos

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both as they are tokenised together; spaces at the seam belong to the continuation."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return [self.prefix_token_id], self.tokenizer.encode(continuation, add_special_tokens=False)
        whole, before = self.tokenizer.encode(stripped + continuation), self.tokenizer.encode(stripped)
        return before, whole[len(before) :]

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Log-likelihood of each (context, continuation); text beyond the context window is cut off at the left."""
        scores: list[Score] = []
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        for first in range(0, len(pairs), AT_ONCE):
            part = pairs[first : first + AT_ONCE]
            prompts = [(context + continuation)[-self.max_length :] for context, continuation in part]
            for output, (_, continuation) in zip(self._llm.generate(prompts, params), part, strict=True):
                entries = (output.prompt_logprobs or [])[1:]  # nothing is said of the first token
                entries = entries[max(0, len(entries) - len(continuation)) :]
                known = [entry for entry in entries if entry is not None]
                greedy = all(entry.top[0][0] == entry.token_id for entry in known)
                scores.append(Score(sum(entry.logprob for entry in known), greedy))
        return scores

    def continued(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        """The model's greedy text after each prompt of token ids, of as many tokens as the window has left."""
        texts: list[str] = []
        for first in range(0, len(prompts), AT_ONCE):
            part = prompts[first : first + AT_ONCE]
            room = [min(max_tokens, self.max_length + 1 - len(prompt)) for prompt in part]
            params = [SamplingParams(temperature=0, max_tokens=most) for most in room]
            texts += [output.outputs[0].text for output in self._llm.generate(part, params)]
        return texts

    def answer(self, asks: Sequence[Ask]) -> list[str]:
        """The model's text after each prompt, up to a stop string."""
        texts: list[str] = []
        for first in range(0, len(asks), AT_ONCE):
            prompts, params = [], []
            for ask in asks[first : first + AT_ONCE]:
                most = min(ask.max_tokens, self.max_length // 2)
                prompts.append(self.tokenizer.encode(ask.prompt)[-(self.max_length - most) :])
                sampling = {"temperature": 0.0} | (ask.sampling or {})
                params.append(SamplingParams(**sampling, max_tokens=most, stop=ask.stops[:MAX_STOPS]))
            texts += [output.outputs[0].text for output in self._llm.generate(prompts, params)]
        return texts
