"""The objective of pre-training: eq. 24 and 25 with the run's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.data.batch import Batch
from leanseek.model import Transformer
from leanseek.training.config import RunConfig
from leanseek.training.objective import Losses, losses
from leanseek.training.schedules import mtp_weight


class NextToken:
    """Computes in `dtype`."""

    stages = True

    def __init__(self, run: RunConfig, dtype: torch.dtype):
        self.run, self.dtype = run, dtype

    def __call__(
        self, model: Transformer, batch: Batch, step: int, hidden: Tensor | None = None, stage: int = 0
    ) -> Losses:
        return losses(
            model,
            batch.tokens,
            hidden,
            weights=batch.weights,
            lengths=batch.lengths,
            share=batch.share,
            mtp_weight=mtp_weight(self.run, step),
            sequence_alpha=self.run.balance.sequence_alpha,
            switch_alpha=self.run.balance.switch_alpha,
            dtype=self.dtype,
            recompute=self.run.train.recompute,
            stage=stage,
        )

    def figures(self) -> dict[str, float]:
        return {}
