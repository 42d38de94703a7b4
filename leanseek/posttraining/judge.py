"""A generative judge (5.2.1): how probable a model finds it that an answer agrees with a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from leanseek.engine import LLM
from leanseek.evaluation.scoring import Scorer
from leanseek.server.templates import template_of


class Judge:
    """A model that replies yes or no.

    Raises:
        InputError: there is no such model, or it has no tokenizer.
    """

    def __init__(self, path: str | Path):
        llm = LLM(path)
        self._scorer = Scorer(llm)
        self._template = template_of(self._scorer.tokenizer, llm.engine.config)

    def agree(self, questions: Sequence[str], yes: str = "yes", no: str = "no") -> list[float]:
        """P(yes) of each question: its probability against that of no."""
        tokenizer = self._scorer.tokenizer
        replies = [tokenizer.encode(reply, add_special_tokens=False) for reply in (yes, no)]
        pairs = []
        for question in questions:
            text = self._template.render([{"role": "user", "content": question}])
            ids = tokenizer.encode(text, add_special_tokens=False)
            pairs += [(ids, reply) for reply in replies]
        found = [score.logprob for score in self._scorer.score(pairs)]
        return [1 / (1 + math.exp(min(700.0, n - y))) for y, n in zip(found[0::2], found[1::2], strict=True)]
