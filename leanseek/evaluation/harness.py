"""lm-eval's tasks through the engine. Importing this needs the extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from leanseek.errors import InputError
from leanseek.evaluation.scoring import Ask, Scorer

MAX_TOKENS = 256  # per answer, if the task sets no limit


class HarnessModel(TemplateLM):
    """An engine as lm-eval sees a model."""

    def __init__(self, scorer: Scorer):
        super().__init__()
        self._scorer = scorer

    @property
    def eot_token_id(self) -> int:
        return self._scorer.end_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._scorer.prefix_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._scorer.tokenizer.encode(string, add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return [
            (score.logprob, score.greedy)
            for score in self._scorer.score([(before, ids) for _, before, ids in requests])
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, cut into windows so that each token is scored once."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._scorer.max_length - 1, context_len=1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scorer.score(pairs), strict=True):
            totals[owner] += score.logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return self._scorer.answer([_ask(*request.args) for request in requests])


def _ask(prompt: str, wanted: dict[str, Any]) -> Ask:
    until = wanted.get("until") or []
    sampled = wanted.get("do_sample", wanted.get("temperature", 0) > 0)
    sampling: dict[str, Any] = {
        name: wanted[name] for name in ("temperature", "top_p", "top_k") if sampled and name in wanted
    }
    return Ask(prompt, [until] if isinstance(until, str) else until, wanted.get("max_gen_toks", MAX_TOKENS), sampling)


def evaluate(
    scorer: Scorer, tasks: Sequence[str], limit: int | None, fewshot: int | None, include_path: Path | None
) -> dict[str, dict[str, Any]]:
    """Metrics by task. include_path: a folder with task files of the user's own.

    Raises:
        InputError: a task is unknown, or its data cannot be had.
    """
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise InputError(f"no task {unknown[0]!r}, neither here nor in lm-eval (`lm-eval ls tasks` lists its own)")
    try:
        found = simple_evaluate(
            HarnessModel(scorer), tasks=list(tasks), limit=limit, num_fewshot=fewshot, task_manager=manager,
            bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:  # the hub's errors are among these
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the data of {', '.join(tasks)} cannot be had: {first}") from None
    return {
        name: {
            key.removesuffix(",none"): value
            for key, value in figures.items()
            if isinstance(value, int | float) and "stderr" not in key
        }
        | {"samples": found["n-samples"][name]["effective"] if name in found["n-samples"] else None}
        for name, figures in found["results"].items()
    }
