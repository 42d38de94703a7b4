"""What the engine asks of whatever runs its steps, and no more."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from leanseek.config import ModelConfig
from leanseek.ops import CacheIndex


class StepBackend(Protocol):
    """A network that computes the new tokens of several sequences at once, over a cache that the engine owns.

    A step's new tokens are N rows, possibly none, sequence after sequence. Every method is row-invariant: a row's
    result is the same bits whatever rows share the call, so a request's tokens do not depend on its neighbours, and a
    backend may add rows of its own. One thread calls it. A result belongs to the caller, who may also write into it,
    until the caller calls that method again.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def device(self) -> torch.device:
        """Where tokens, cache and index are handed in, and results are handed out."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and of the cache."""

    def step(self, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Tensor:
        """tokens [N] int64 -> hidden [N, D] after the final norm.

        cache [num_hidden_layers (+ 1), slots, cache_width] is read and written in place: row n's latent of layer l goes
        to cache[l, index.slots[n]]. A last layer is the MTP module's.
        """

    def step_ahead(self, depth: int, hidden: Tensor, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Tensor:
        """MTP module `depth` (from 1): hidden [N, D] of depth - 1, the tokens [N] after those rows -> hidden [N, D].

        cache and index as in `step`; the module's layer is num_hidden_layers + depth - 1.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] of any rows -> [R, vocab_size] float32."""
