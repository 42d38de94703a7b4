"""The reference of the KL: the policy as it was, kept in the run's folder, since a resumed run needs it again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from leanseek import checkpoint, fp8
from leanseek.config import ConfigError
from leanseek.posttraining.policy import Policy

KEPT = 3  # references on disk: a run resumes from a checkpoint that is older than the newest


class References:
    """`runs/NAME/references/step-N`, each the policy after N steps; step-0 stays.

    begun: the step at which the run begins or goes on. stored: the one whose policy is the reference, from the
    checkpoint; None: there was none, and the policy is the reference from now on.

    Raises:
        ConfigError: the reference is gone.
    """

    def __init__(self, run: Path, policy: Policy, begun: int, stored: int | None):
        self._folder, self._policy = run / "references", policy
        if begun == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        if stored is None:
            self.replace(begun)
            return
        if not self._path(stored).is_dir():
            raise ConfigError(f"{self._path(stored)}, the reference of this checkpoint, is gone: set grpo.beta = 0")
        for later in self._steps():
            if later > stored:
                shutil.rmtree(self._path(later))
        model = checkpoint.load(self._path(stored), policy.device).requires_grad_(False)
        fp8.apply(model, policy.precision)
        self.policy, self.step = Policy(model, policy.dtype, policy.precision), stored

    def replace(self, step: int) -> None:
        """From here on the policy as it is now is the reference."""
        self.policy, self.step = self._policy.frozen(), step
        checkpoint.save(self.policy.model, self._path(step), "hf")
        for old in self._steps()[1:-KEPT]:
            shutil.rmtree(self._path(old))

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}"

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.glob("step-*"))
        return sorted(int(name[1]) for name in found if name)
