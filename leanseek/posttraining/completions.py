"""completions.jsonl: what the policy said in each step, with its rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from leanseek.posttraining.prompts import Prompt
from leanseek.posttraining.rollouts import Completion
from leanseek.reading import parse_json, read_bytes
from leanseek.writing import replace_file

FILE = "completions.jsonl"
MOST_BYTES = 2**34


class CompletionLog:
    """Appends a line for each completion. Lines of steps from `step` on, where a run goes on, are removed first."""

    def __init__(self, run: Path, step: int):
        self.path = run / FILE
        kept: list[bytes] = []
        if step and self.path.is_file():
            *lines, _ = read_bytes(self.path, limit=MOST_BYTES).split(b"\n")
            kept = [line for line in lines if parse_json(line, str(self.path))["step"] <= step]
        replace_file(self.path, b"".join(line + b"\n" for line in kept))

    def write(
        self,
        step: int,
        prompts: Sequence[tuple[Prompt, list[int]]],
        completions: Sequence[Sequence[Completion]],
        total: Sequence[float | None],
        by_name: Mapping[str, Sequence[float | None]],
        advantages: Sequence[float],
    ) -> None:
        """step: from 0; a row's counts from 1, as those of metrics.jsonl."""
        flat = [(prompt.prompt, c) for (prompt, _), group in zip(prompts, completions, strict=True) for c in group]
        with self.path.open("a", encoding="utf-8") as file:
            for place, (prompt, c) in enumerate(flat):
                row = {
                    "step": step + 1,
                    "prompt": prompt,
                    "completion": c.text,
                    "reward": total[place],
                    "rewards": {name: scores[place] for name, scores in by_name.items()},
                    "advantage": advantages[place],
                    "tokens": len(c.token_ids),
                    "cut_off": c.cut_off,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
