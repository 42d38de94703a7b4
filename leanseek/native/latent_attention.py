"""Attention over the paged cache of latents, row-invariant."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek import ops
from leanseek.native.library import DTYPES, implements, kernel
from leanseek.ops.dispatch import Rows
from leanseek.ops.latent_attention import CacheIndex

_attention = kernel("latent_attention", "np nnn ppp nnn np n f p")


def _cached(q: Tensor, cache: Tensor, *_: object) -> bool:
    return q.device.type == "cpu" and cache.dtype in DTYPES and cache.is_contiguous()


@implements(ops.latent_attention, _cached, Rows.BOTH)
def latent_attention(q: Tensor, cache: Tensor, index: CacheIndex, scale: float, value_width: int) -> Tensor:
    tokens, heads, width = q.shape
    rows = q.float().contiguous()
    out = torch.empty(tokens, heads, value_width)
    pages = index.pages.contiguous()
    _attention(
        DTYPES[cache.dtype], cache.data_ptr(), width, value_width, index.page_size, index.positions.data_ptr(),
        index.row_offsets.data_ptr(), pages.data_ptr(), tokens, *pages.shape, q.dtype == torch.bfloat16,
        rows.data_ptr(), heads, scale, out.data_ptr(),
    )  # fmt: skip
    return out.to(q.dtype)
