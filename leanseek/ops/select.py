"""The gate (2.1.2): its scores, and its choice of experts, node-limited and then top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek.ops.dispatch import op


@op("expert_scores")
def expert_scores(logits: Tensor, scoring_func: str) -> Tensor:
    """s of eq. 15 from the gate's logits [N, E] float32: their sigmoid (V3) or softmax (V2)."""
    return logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)


@op("select_experts")
@torch.no_grad()
def select_experts(
    scores: Tensor, bias: Tensor | None, top_k: int, n_group: int = 1, topk_group: int = 1, group_best: int = 2
) -> Tensor:
    """Indices [N, top_k] int64 of the experts each token goes to; no gradient.

    scores [N, E] float32; bias [E] float32 or None, added for the choice alone (eq. 16). With n_group > 1 the experts
    lie in n_group equal groups, a group scores the sum of its `group_best` highest values (2 in V3, 1 in V2), and only
    experts of the topk_group best groups can be chosen.
    """
    choice = scores if bias is None else scores + bias  # eq. 16: s + b, for the choice alone
    if n_group > 1:
        grouped = choice.unflatten(1, (n_group, -1))  # [N, G, E/G]
        group_score = grouped.topk(group_best, dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(1, group_score.topk(topk_group, dim=-1, sorted=False).indices, True)
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    return choice.topk(top_k, dim=-1, sorted=False).indices
