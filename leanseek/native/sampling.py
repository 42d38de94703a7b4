"""Tokens from rows of logits, without sorting a row; and which rows are sound."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek import ops
from leanseek.native.library import accepts, implements, kernel, pointers
from leanseek.ops.dispatch import Rows
from leanseek.ops.sampling import Choice

_sample_rows = kernel("sample_rows", "pnnn pppp pp")
_finite_rows = kernel("finite_rows", "pnnn p")


def _takes(logits: Tensor, *_: object) -> bool:
    return accepts(logits) and logits.dtype == torch.float32


@implements(ops.sample, _takes, Rows.BOTH)
def sample(logits: Tensor, choice: Choice) -> Tensor:
    tokens = torch.empty(len(logits), dtype=torch.int64)
    c = choice
    inputs = [t.contiguous() for t in (c.temperature, c.top_k, c.top_p, c.min_p, c.keys)]
    _sample_rows(logits.data_ptr(), logits.stride(0), *logits.shape, *pointers(*inputs), tokens.data_ptr())
    return tokens


@implements(ops.finite_rows, _takes, Rows.BOTH)
def finite_rows(logits: Tensor) -> Tensor:
    finite = torch.empty(len(logits), dtype=torch.bool)
    _finite_rows(logits.data_ptr(), logits.stride(0), *logits.shape, finite.data_ptr())
    return finite
