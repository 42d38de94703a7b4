"""Absorbed MLA attention over a paged cache of latents (2.1.1): decode and chunked prefill."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.ops.dispatch import op
from leanseek.ops.products import wide


class CacheIndex(NamedTuple):
    """Where a step's N new tokens of S sequences lie, in the batch and in the cache; int64, on the cache's device."""

    positions: Tensor  # [N] position of each new token in its sequence
    slots: Tensor  # [N] cache row each new token writes
    row_offsets: Tensor  # [S + 1] new tokens of sequence s are rows row_offsets[s]:row_offsets[s + 1]
    lengths: Tensor  # [S] tokens in the cache once this step's are written
    pages: Tensor  # [S, P] page numbers of each sequence, in order; page p is rows p·page_size onwards
    page_size: int

    def rows_of(self, sequence: int) -> Tensor:
        """Cache rows [L] of a sequence's tokens, in order."""
        length = int(self.lengths[sequence])
        used = self.pages[sequence, : -(-length // self.page_size)]
        rows = used[:, None] * self.page_size + torch.arange(self.page_size, device=used.device)
        return rows.flatten()[:length]


@op("latent_attention")
def latent_attention(q: Tensor, cache: Tensor, index: CacheIndex, scale: float, value_width: int) -> Tensor:
    """Attention of every head over one shared row per cached token.

    q [N, H, W] (absorbed query and rotary query); cache [slots, W], the new tokens' rows already written;
    the value of a row is its first `value_width` columns. Causal by `index.positions`. Returns [N, H, value_width].
    """
    out = q.new_empty(*q.shape[:2], value_width)
    offsets = index.row_offsets.tolist()
    for sequence, (start, stop) in enumerate(pairwise(offsets)):
        queries, rows = wide(q[start:stop], cache[index.rows_of(sequence)].to(q.dtype))  # [n, H, W], [L, W]
        scores = torch.einsum("nhw,lw->nhl", queries, rows).float() * scale
        future = torch.arange(rows.shape[0], device=q.device) > index.positions[start:stop, None]  # [n, L]
        weights = scores.masked_fill_(future[:, None], float("-inf")).softmax(-1).to(rows.dtype)
        # A wrong draft may leave NaN in a later row, and 0 · NaN is NaN. A query that may read it has a NaN score.
        values = rows[:, :value_width].nan_to_num(0.0, 0.0, 0.0)
        out[start:stop] = torch.einsum("nhl,lw->nhw", weights, values)
    return out
