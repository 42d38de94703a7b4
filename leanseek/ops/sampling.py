"""Rows of logits become tokens, each row by its own parameters and its own random bits.

The noise is one number per token id (Gumbel-max: argmax of log p + noise has the distribution p), from the id and the
row's 64 bits alone. A row's token depends on nothing but the row: masses are added as integers, whose sum has no order,
and the cut of top_k and top_p is a weight and a count, which no order of equal weights can change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leanseek.ops.dispatch import op

GPU_ROWS = 32  # rows at a time
CPU_ROWS = 1  # a CPU's vector loops end in other code, so there each row goes alone
FIRST_LOOK = 256  # largest weights looked at for a cut before more are
UNIT = 2.0**40  # a weight of 1 as an integer: the sum over any vocabulary stays below 2**63


@dataclass
class Choice:
    """How rows become tokens: a value per row, on the device."""

    temperature: Tensor  # [R] float32; 0 is greedy
    top_k: Tensor  # [R] int64; the vocabulary's size for all
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32
    keys: Tensor  # [R] int64: the 64 random bits of each row

    def at(self, rows: Tensor | slice) -> Choice:
        """The choice for some rows only."""
        return Choice(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.keys[rows])


@op("sample")
def sample(logits: Tensor, choice: Choice) -> Tensor:
    """logits [R, V] float32 -> tokens [R] int64. top_k first, then top_p over what is left, then min_p.

    Whatever the logits, a token is one of the vocabulary: a NaN counts as -inf, and of a row whose largest is infinite
    the first that is as large is taken. `finite_rows` tells such rows.
    """
    step = GPU_ROWS if logits.is_cuda else CPU_ROWS
    parts = [slice(start, start + step) for start in range(0, len(logits), step)]
    return torch.cat([_sample(logits[rows], choice.at(rows)) for rows in parts])


def logprobs(logits: Tensor, temperature: Tensor) -> Tensor:
    """log softmax(logits / temperature) of rows [R, V] float32, temperature [R] float32. Row-invariant.

    The sampler and the trainer of reinforcement learning both take their numbers from here.
    """
    return (logits * (1 / temperature.clamp_min(1e-6))[:, None]).log_softmax(-1)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: Tensor) -> Tensor:
    """`logprobs` of each row's token [R] int64, [R]; 0 at temperature 0."""
    found = logprobs(logits, temperature).gather(1, tokens[:, None]).squeeze(1)
    return torch.where(temperature == 0, 0.0, found)


@op("finite_rows")
def finite_rows(logits: Tensor) -> Tensor:
    """logits [R, V] float32 -> bool [R]: no NaN and no infinity in the row."""
    return torch.linalg.vector_norm(logits, math.inf, -1).isfinite()  # the largest magnitude; NaN if there is one


def _sample(logits: Tensor, choice: Choice) -> Tensor:
    logits = torch.where(logits.isnan(), -math.inf, logits)
    top, likeliest = logits.max(-1)
    greedy = (choice.temperature == 0) | ~top.isfinite()
    if bool(greedy.all()):
        return likeliest
    inverse = 1 / choice.temperature.clamp_min(1e-6)
    weights = ((logits - top[:, None]) * inverse[:, None]).exp()  # [R, V], the likeliest 1
    kept = (weights > 0) & (weights >= choice.min_p[:, None]) & _within_cut(weights, choice)
    rows, ids = kept.nonzero(as_tuple=True)
    scores = torch.full(weights.shape, math.inf, dtype=torch.float64, device=weights.device)
    # the least -log(u) / p is the largest log p + Gumbel noise
    scores[rows, ids] = -_uniform(choice.keys[rows], ids).log() / weights[rows, ids]
    return torch.where(greedy, likeliest, scores.argmin(-1))


def _within_cut(weights: Tensor, choice: Choice) -> Tensor:
    """Which of weights [R, V] top_k keeps, and top_p of those: the token that crosses it stays, of equals the first."""
    vocab_size = weights.shape[1]
    limited, by_mass = choice.top_k < vocab_size, choice.top_p < 1
    if not bool((limited | by_mass).any()):
        return torch.ones_like(weights, dtype=torch.bool)
    everything = _mass(weights).sum(-1)
    for width in _widths(vocab_size):
        top = weights.topk(width, dim=-1).values  # [R, C], falling
        within_k = torch.arange(width, device=weights.device) < choice.top_k[:, None]
        mass = _mass(top)
        total = torch.where(limited, (mass * within_k).sum(-1), everything)
        before = mass.cumsum(-1) - mass
        enough = choice.top_p.double() * total  # [R]
        count = (within_k & ((before < enough[:, None]) | ~by_mass[:, None])).sum(-1)
        open_ended = ~limited & ~by_mass
        settled = (count < width) & (~limited | (choice.top_k <= width))
        if width == vocab_size or bool((settled | open_ended).all()):
            break
    last = top.gather(1, (count - 1).clamp_min(0)[:, None])  # [R, 1] the weight at which the cut lies
    equals = count[:, None] - (top > last).sum(-1, keepdim=True)  # how many of that weight are kept
    same = weights == last
    return (weights > last) | (same & (same.cumsum(-1) <= equals)) | open_ended[:, None]


def _widths(vocab_size: int) -> list[int]:
    return [width for width in (FIRST_LOOK, 32 * FIRST_LOOK) if width < vocab_size] + [vocab_size]


def _mass(weights: Tensor) -> Tensor:
    return (weights.double() * UNIT).long()


def _uniform(keys: Tensor, ids: Tensor) -> Tensor:
    """A number in (0, 1) per pair, float64: splitmix64 of both, without its sign-extending shifts."""
    z = ids * -7046029254386353131 + keys
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -4658895280553007687
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -7723592293110705685
    z = z ^ ((z >> 31) & (2**33 - 1))
    return (((z >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52
