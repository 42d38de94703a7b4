"""Rows of logits become tokens, each row by its own parameters and its own random bits.

The noise is one number per token id (Gumbel-max: argmax of log p + noise has the distribution p), from the id and the
row's 64 bits alone: a row's token depends on nothing but the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leanseek.ops.dispatch import pick

_REST, _WITHIN_REST = -1, -2  # ids of the noise for all but the candidates, and for the choice among those


@dataclass
class Choice:
    """How rows become tokens: a value per row, on the device."""

    temperature: Tensor  # [R] float32; 0 is greedy
    top_k: Tensor  # [R] int64; the vocabulary's size for all
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32
    keys: Tensor  # [R] int64: the 64 random bits of each row
    filtered: bool  # whether any row restricts its candidates
    width: int  # candidates to look at: as many as the largest top_k

    def at(self, rows: Tensor, width: int) -> Choice:
        """Of some rows only, looking at `width` candidates."""
        temperature, top_k, top_p, min_p, keys = (
            values[rows] for values in (self.temperature, self.top_k, self.top_p, self.min_p, self.keys)
        )
        return Choice(temperature, top_k, top_p, min_p, keys, self.filtered, width)


def sample(logits: Tensor, choice: Choice) -> Tensor:
    """logits [R, V] float32 -> tokens [R] int64. top_k first, then top_p over what is left, then min_p.

    Whatever the logits, a token is one of the vocabulary: a NaN counts as -inf, and of a row whose largest is infinite
    the first that is as large is taken. `finite_rows` tells such rows.
    """
    return pick("sample", reference, logits)(logits, choice)


def reference(logits: Tensor, choice: Choice) -> Tensor:
    logits = torch.where(logits.isnan(), -math.inf, logits)
    top, likeliest = logits.max(-1)
    sampled = _race(logits / choice.temperature.clamp_min(1e-6)[:, None], choice)
    return torch.where((choice.temperature == 0) | ~top.isfinite(), likeliest, sampled)


def finite_rows(logits: Tensor) -> Tensor:
    """logits [R, V] float32 -> bool [R]: no NaN and no infinity in the row."""
    return pick("finite_rows", _finite_rows, logits)(logits)


def _finite_rows(logits: Tensor) -> Tensor:
    return torch.linalg.vector_norm(logits, math.inf, -1).isfinite()  # the largest magnitude; NaN if there is one


def _race(scaled: Tensor, choice: Choice) -> Tensor:
    """The winners [R] of log p + noise: the likeliest candidates each for itself, and all others as one runner."""
    top, ids = scaled.topk(choice.width, dim=-1)  # [R, C]
    log_p = top - scaled.logsumexp(-1, keepdim=True)
    unsettled = torch.zeros_like(choice.keys, dtype=torch.bool)
    rest = (1 - log_p.exp().sum(-1)).clamp_min(0) if choice.width < scaled.shape[1] else torch.zeros_like(log_p[:, 0])
    if choice.filtered:
        log_p, open_ended, unsettled = _filter(log_p, choice, scaled.shape[1])
        rest = torch.where(open_ended, rest, 0.0)
    best, place = (log_p + _gumbel(choice.keys[:, None], ids)).max(-1)
    winner = ids.gather(1, place[:, None]).squeeze(1)
    if choice.width == scaled.shape[1]:
        return winner
    behind = rest.log() + _gumbel(choice.keys, torch.full_like(choice.keys, _REST)) > best
    if bool((behind | unsettled).any()):
        rows = behind.nonzero().squeeze(1)
        winner[rows] = _among_rest(scaled[rows], ids[rows], choice.keys[rows], winner[rows])
        rows = unsettled.nonzero().squeeze(1)
        if len(rows):
            winner[rows] = _race(scaled[rows], choice.at(rows, min(8 * choice.width, scaled.shape[1])))
    return winner


def _filter(log_p: Tensor, choice: Choice, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates [R, C], those cut off at -inf; which rows [R] cut none; which rows' cut lies past the candidates.

    top_k first, then top_p over what is left (the token that crosses it stays); min_p against the likeliest token.
    """
    p = log_p.exp()
    limited = choice.top_k < vocab_size
    kept = torch.arange(log_p.shape[1], device=log_p.device) < choice.top_k[:, None]
    mass = torch.where(limited, (p * kept).sum(-1), 1.0)  # [R]
    before = p.cumsum(-1) - p
    kept &= (before < choice.top_p[:, None] * mass[:, None]) | (choice.top_p == 1)[:, None]
    kept &= p >= choice.min_p[:, None] * p[:, :1]
    open_ended = ~limited & (choice.top_p == 1) & (choice.min_p == 0)
    unsettled = kept[:, -1] & ~limited & ~open_ended
    return log_p.masked_fill(~kept, -math.inf), open_ended, unsettled


def _among_rest(scaled: Tensor, ids: Tensor, keys: Tensor, otherwise: Tensor) -> Tensor:
    """A token [R] that is none of ids [R, C], by the inverse of the cumulative distribution.

    `otherwise` [R] where all others are forbidden, and the rest's mass was rounding.
    """
    cumulative = scaled.softmax(-1).scatter_(1, ids, 0.0).cumsum(-1, dtype=torch.float64)
    level = cumulative[:, -1:] * _uniform(keys, torch.full_like(keys, _WITHIN_REST))[:, None]
    token = torch.searchsorted(cumulative, level, right=True).squeeze(1).clamp_max(scaled.shape[1] - 1)
    return torch.where(cumulative[:, -1] > 0, token, otherwise)


def _gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    return -(-_uniform(keys, ids).log()).log()


def _uniform(keys: Tensor, ids: Tensor) -> Tensor:
    """A number in (0, 1) per pair, float64: splitmix64 of both, without its sign-extending shifts."""
    z = ids * -7046029254386353131 + keys
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -4658895280553007687
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -7723592293110705685
    z = z ^ ((z >> 31) & (2**33 - 1))
    return (((z >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52
