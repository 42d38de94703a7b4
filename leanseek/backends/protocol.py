"""What the engine asks of whatever runs its steps, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from leanseek.config import ModelConfig
from leanseek.ops import CacheIndex

PAGE = 16  # rows of a page of whole sequences


class Trace(NamedTuple):
    """What a step went through."""

    states: Tensor  # [layers + 1, N, D]: what each layer begins with and what the last one ends with
    routes: Tensor  # [layers, N, K] int64: the experts of each layer; anything where it has none
    hidden: Tensor  # [N, D], as `step` returns it


def whole(lengths: Sequence[int], device: torch.device) -> CacheIndex:
    """The index of a step that computes whole sequences of these lengths, one after the other, in an empty cache."""
    counts = torch.tensor(lengths, device=device)
    used = (counts + PAGE - 1) // PAGE
    first = used.cumsum(0) - used  # of each sequence's pages
    owner = torch.repeat_interleave(counts)
    offsets = torch.tensor([0, *accumulate(lengths)], device=device)
    positions = torch.arange(len(owner), device=device) - offsets[owner]
    most = torch.arange(int(used.max()) if lengths else 0, device=device)
    pages = (first[:, None] + most).clamp(max=max(0, int(used.sum()) - 1))
    return CacheIndex(positions, first[owner] * PAGE + positions, offsets, counts, pages, PAGE)


def scratch(index: CacheIndex, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """A cache for `whole`, [layers, slots, W]. Layers share its memory, since each reads what it has just written."""
    slots = (int(index.pages.max()) + 1) * index.page_size if index.pages.numel() else 0
    rows = torch.zeros(slots, config.cache_width, dtype=dtype, device=index.pages.device)
    return rows.expand(config.num_hidden_layers, -1, -1)


def trace(backend: StepBackend, tokens: Tensor, lengths: Sequence[int]) -> Trace:
    """Whole sequences, tokens [N] int64 one after the other: the same bits as `step` in any steps."""
    index = whole(lengths, backend.device)
    return backend.trace(tokens, scratch(index, backend.config, backend.dtype), index)


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

    def trace(self, tokens: Tensor, cache: Tensor, index: CacheIndex) -> Trace:
        """As `step`, with what it went through."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] of any rows -> [R, vocab_size] float32."""
