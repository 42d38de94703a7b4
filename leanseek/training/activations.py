"""How much a training step keeps for backward, measured."""

from __future__ import annotations

from torch import Tensor

from leanseek.data.batch import Batch
from leanseek.fp8 import live_bytes
from leanseek.training.trainer import Trainer


def activation_bytes_per_token(trainer: Trainer, tokens: Tensor) -> float:
    """Bytes alive between forward and backward that grow with the batch, per token of tokens [2, T + lookahead].

    Two sequences less one: what does not grow (casts of the weights, tables) falls out.
    """
    batch = Batch(tokens, len(tokens)).to(trainer.device)

    def kept(sequences: int) -> int:
        return live_bytes(lambda: trainer.forward(batch.rows(0, sequences)), trainer.device)

    trainer.forward(batch)  # whatever is made once is made now
    return (kept(2) - kept(1)) / (tokens.shape[1] - trainer.run.model.lookahead)
