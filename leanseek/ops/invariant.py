"""Row-invariant forms of the ops in plain torch: what a row becomes does not depend on the rows it shares a call with.

Matrix libraries choose how to split a sum by the number of rows, so the same row differs in its last bits from one
batch to the next; a mixture of experts then turns a last bit into another expert. Here every sum has one order:
- matrix products go to oneDNN, which keeps one order from 2 rows on, or in blocks of a fixed number of rows, in float32
  where the CPU has none of the operands' dtype (products.py);
- batched products have at least 16 rows each and at least two in the batch, where MKL keeps one order;
- attention sums fixed blocks of keys in their order;
- sigmoid and SiLU are spelled with exp, which torch computes alike in the body and the tail of a vector loop.
tests/ops/test_invariant.py holds each of these claims bit for bit on the machine it runs on. Slower than kernels made
for this (native): the fallback where those are not built.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as functional
from torch import Tensor

from leanseek import ops
from leanseek.machine.device import onednn_linear
from leanseek.ops.dispatch import Op, Priority, Rows
from leanseek.ops.experts import each_expert, products_of_rows
from leanseek.ops.latent_attention import CacheIndex
from leanseek.ops.products import wide
from leanseek.ops.weights import StoredWeight, dense

F = TypeVar("F", bound=Callable[..., Any])

BLOCK_ROWS = 64  # rows of a product where oneDNN is not there: the only number ever asked for
MIN_ROWS = 16  # rows of a batched product
BLOCK_KEYS = 128  # cached tokens whose weighted values are one sum
QUERY_ROWS = 1024  # queries x heads scored at a time


def _invariant(op: Op[..., Any]) -> Callable[[F], F]:
    """Decorator: the row-invariant form of `op` in torch, for any operands, where no kernel takes them."""
    return op.register("torch", lambda *_, **__: True, Priority.TORCH, Rows.INVARIANT)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] · weight [out, in]ᵀ."""
    rows, dtype = x.shape[0], x.dtype
    x, weight = wide(x, weight)
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        x = x.expand(2, -1) if rows == 1 else x
        return onednn_linear(x.contiguous(), weight)[:rows].to(dtype)
    blocks = functional.pad(x, (0, 0, 0, -rows % BLOCK_ROWS)).split(BLOCK_ROWS)
    return torch.cat([functional.linear(block, weight) for block in blocks])[:rows].to(dtype)


@_invariant(ops.linear)
def linear(x: Tensor, weight: StoredWeight) -> Tensor:
    return _product(x.reshape(-1, x.shape[-1]), dense(weight, x.dtype)).view(*x.shape[:-1], weight.shape[0])


@_invariant(ops.head_linear)
def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    return _batched(x.transpose(0, 1), weight).transpose(0, 1).to(x.dtype)


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, K] · b [B, K, N], in the dtype that was multiplied."""
    batch, rows = a.shape[:2]
    a, b = wide(a, b)
    a = functional.pad(a, (0, 0, 0, max(0, MIN_ROWS - rows)))
    if batch == 1:  # alone in its batch, a product may be split among threads
        a, b = a.expand(2, -1, -1), b.expand(2, -1, -1)
    return torch.bmm(a, b)[:batch, :rows]


@_invariant(ops.swiglu)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate.float()
    return (wide / (1 + (-wide).exp())).to(gate.dtype) * up


@_invariant(ops.expert_scores)
def expert_scores(logits: Tensor, scoring_func: str) -> Tensor:
    return 1 / (1 + (-logits).exp()) if scoring_func == "sigmoid" else logits.softmax(-1)


_invariant(products_of_rows)(each_expert)


@_invariant(ops.latent_attention)
def latent_attention(q: Tensor, cache: Tensor, index: CacheIndex, scale: float, value_width: int) -> Tensor:
    out = q.new_empty(*q.shape[:2], value_width)
    offsets = index.row_offsets.tolist()
    alike = defaultdict(list)  # sequences with equally many new tokens run together
    for sequence, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if stop > start:
            alike[stop - start].append(sequence)
    for n, sequences in alike.items():
        chosen = torch.tensor(sequences, device=q.device)
        rows = index.row_offsets[chosen, None] + torch.arange(n, device=q.device)  # [S, n]
        keys = _blocks_of_keys(cache, index, chosen).to(q.dtype)
        for part in rows.split(max(1, QUERY_ROWS // q.shape[1]), dim=1):
            out[part] = _attend(q[part], keys, index.positions[part], scale, value_width)
    return out


def _blocks_of_keys(cache: Tensor, index: CacheIndex, sequences: Tensor) -> Tensor:
    """Cached rows of sequences [S] in whole blocks, [S, B, BLOCK_KEYS, W]; zeros past a sequence's end.

    What lies there was another request's, and a NaN times a weight of zero is a NaN.
    """
    lengths = index.lengths[sequences]
    longest = int(lengths.max())
    keys = torch.arange(-(-longest // BLOCK_KEYS) * BLOCK_KEYS, device=cache.device)
    page = (keys // index.page_size).clamp(max=index.pages.shape[1] - 1)
    rows = index.pages[sequences][:, page] * index.page_size + keys % index.page_size  # [S, B·BLOCK_KEYS]
    return cache[rows].masked_fill_((keys >= lengths[:, None])[..., None], 0.0).unflatten(1, (-1, BLOCK_KEYS))


def _attend(q: Tensor, keys: Tensor, positions: Tensor, scale: float, value_width: int) -> Tensor:
    """q [S, n, H, W], keys [S, B, K, W], positions [S, n] -> [S, n, H, value_width]."""
    s, n, heads, width = q.shape
    blocks = keys.shape[1]
    flat = keys.flatten(0, 1)  # [S·B, K, W]
    queries = q.reshape(s, 1, n * heads, width).expand(-1, blocks, -1, -1).flatten(0, 1)  # [S·B, n·H, W]
    scores = _batched(queries, flat.transpose(1, 2)).float() * scale  # [S·B, n·H, K]
    scores = scores.view(s, blocks, n, heads, BLOCK_KEYS)
    place = torch.arange(blocks * BLOCK_KEYS, device=q.device).view(blocks, 1, BLOCK_KEYS)
    future = place > positions[:, None, :, None]  # [S, B, n, K]
    scores = scores.masked_fill(future[:, :, :, None], float("-inf"))
    top = scores.amax((1, 4), keepdim=True)  # a maximum has no order
    weights = (scores - top).exp()
    readable = flat[..., :value_width].nan_to_num(0.0, 0.0, 0.0)  # as in the reference
    values = _batched(weights.to(q.dtype).view(s * blocks, n * heads, -1), readable).float()
    values = values.view(s, blocks, n, heads, value_width)
    total, mass = values[:, 0], weights[:, 0].sum(-1, keepdim=True)
    for block in range(1, blocks):  # in order: blocks past a query add exact zeros
        total, mass = total + values[:, block], mass + weights[:, block].sum(-1, keepdim=True)
    return (total / mass).to(q.dtype)
