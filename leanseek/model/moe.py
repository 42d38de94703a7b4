"""DeepSeekMoE (section 2.1.2): the gate, the experts, and what keeps them balanced.

Nothing here counts: a forward returns a `Route` per layer and whoever trains adds them up. So micro-batches add,
recomputation does not count twice, and evaluation does not count at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from leanseek import ops
from leanseek.config import ModelConfig
from leanseek.model.layers import MLP


class Route(NamedTuple):
    """Where one MoE layer sent N tokens. Handing `indices` back to a forward replays the choice."""

    layer: int
    indices: Tensor  # [N, K] int64, the experts chosen
    weights: Tensor  # [N, K] float32, the gate values g
    scores: Tensor  # [N, E] float32, s before bias and choice


class _Logits(torch.autograd.Function):
    """x · weightᵀ in float32, [N, E], keeping x as it came instead of a float32 copy."""

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return ops.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        (found,) = ops.weight_gradients((weight,), lambda: ((grad.t() @ x.float()).to(weight.dtype),))
        return (grad @ weight.float()).to(x.dtype), found


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, D] · weightᵀ [D, E] in float32, whatever their dtypes."""
    if not ops.ordinary(x, weight):  # transforms do not follow functions with a backward of their own
        return ops.linear(x.float(), weight.float())
    return _Logits.apply(x, weight)


class Gate(nn.Module):
    """Scores every expert and chooses K; float32 throughout, whatever the model's dtype."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, device=device, dtype=dtype))
        bias = torch.zeros(config.n_routed_experts, device=device) if config.selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if exact is not None and moved is not None and moved.dtype != torch.float32:
            # a bias in BF16 cannot take steps of γ = 0.001: model.bfloat16() leaves it float32
            self.e_score_correction_bias = exact.to(moved.device)
        return self

    def forward(self, x: Tensor, replay: Tensor | None = None) -> Route:
        """x [N, D] -> Route. `replay` [N, K] fixes the choice; the gate values are computed anew."""
        c = self.config
        logits = gate_logits(x, self.weight)  # [N, E]
        scores = ops.expert_scores(logits, c.scoring_func)  # eq. 15
        indices = replay
        if indices is None:
            groups = (c.n_group, c.topk_group) if c.grouped_routing else (1, 1)
            best = 2 if c.selection_bias else 1
            # eq. 16: chosen by s + b, and the gate value comes from s alone
            indices = ops.select_experts(scores, self.e_score_correction_bias, c.num_experts_per_tok, *groups, best)
        weights = scores.gather(1, indices)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # eq. 13
        return Route(self.layer, indices, weights * c.routed_scaling_factor, scores)


class Experts(nn.Module):
    """The weights of the routed experts `numbers`, stacked. Quantised ones may take the parameters' place, for
    inference."""

    def __init__(
        self, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype, numbers: range | None = None
    ):
        super().__init__()
        self.numbers = range(config.n_routed_experts) if numbers is None else numbers
        e, d, i = len(self.numbers), config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj: nn.Parameter | ops.QuantizedWeight
        self.down_proj: nn.Parameter | ops.QuantizedWeight
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, d, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(e, d, i, device=device, dtype=dtype))

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """x [N, D] -> [N, D], the weighted sum of each token's experts."""
        sent = ops.expert_dispatch(x, route.indices, route.weights, self.down_proj.shape[0])
        return ops.expert_combine(self.products(sent), sent)

    def products(self, sent: ops.Dispatched) -> Tensor:
        """Each expert on its own rows, times their gate values: [M, D]. An exchange of rows stands before and after."""
        return ops.expert_products(sent, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """eq. 12: shared experts on every token, plus the routed experts the gate chose."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
        experts: range | None = None,
    ):
        super().__init__()
        self.gate = Gate(config, layer, device, dtype)
        self.experts = Experts(config, device, dtype, experts)
        self.shared_experts = None
        if config.n_shared_experts:
            size = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config, size, device, dtype)

    def forward(self, x: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Route]:
        """x [..., D] -> ([..., D], Route over the flattened tokens)."""
        flat = x.reshape(-1, x.shape[-1])
        route = self.gate(flat, replay)
        out = self.experts(flat, route).view(x.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat).view(x.shape)
        return out, route


# ---- balance: functions of routes ----


def load_counts(route: Route) -> Tensor:
    """Tokens each expert received, [E] int64: exact, so that sums over micro-batches and ranks are too."""
    return torch.bincount(route.indices.flatten(), minlength=route.scores.shape[1])


def max_violation(counts: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load of counts [..., E]; float32 [...]."""
    mean = counts.double().mean(-1)
    return ((counts.amax(-1) - mean) / mean.clamp_min(1e-9)).float()


def sequence_balance_loss(route: Route, batch: int, top_k: int) -> Tensor:
    """eq. 17 to 20 without α, averaged over the `batch` sequences: Σ_i f_i P_i.

    f_i counts the tokens whose top-k by s (without b) holds expert i; P_i is the mean of s normalised over experts.
    """
    experts = route.scores.shape[1]
    scores = route.scores.view(batch, -1, experts)  # [B, T, E]
    chosen = scores.detach().topk(top_k, dim=-1, sorted=False).indices.flatten(1)
    f = torch.zeros(batch, experts, device=scores.device).scatter_add_(
        1, chosen, torch.ones_like(chosen, dtype=torch.float32)
    )
    f = f * (experts / (top_k * scores.shape[1]))  # eq. 18
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)  # eq. 19, 20
    return (f * p).sum(-1).mean()


def sample_balance_loss(route: Route, members: Tensor, top_k: int) -> Tensor:
    """`sequence_balance_loss` of packed samples, as the sum over them of length times loss.

    members [S, N] float32: 1 where a token of the route belongs to a sample.
    """
    chosen = route.scores.detach().topk(top_k, dim=-1, sorted=False).indices
    each = torch.zeros_like(route.scores).scatter_(1, chosen, 1.0)  # [N, E]
    counts, scores = members @ each, members @ (route.scores / route.scores.sum(-1, keepdim=True))  # [S, E]
    return (counts * scores).sum(-1).div(members.sum(-1)).sum() * (route.scores.shape[1] / top_k)


def switch_balance_loss(route: Route) -> Tensor:
    """The Switch Transformer's auxiliary loss without its factor (arXiv 2101.03961, eq. 4 to 6), over the batch."""
    n, experts = route.scores.shape
    f = load_counts(route).float() / (n * route.indices.shape[1])
    p = (route.scores / route.scores.sum(-1, keepdim=True)).mean(0)
    return experts * (f * p).sum()
