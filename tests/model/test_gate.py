"""The gate (2.1.2): selection by s + b within the best groups, gate values from s alone, and routes that replay."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leanseek.config import ModelConfig
from leanseek.model import Route, Transformer, load_counts
from leanseek.model.moe import Gate, MoE

TOKENS = 6


@st.composite
def gates(draw: st.DrawFn) -> tuple[Gate, Tensor]:
    """A random gate with selection bias, and inputs for it."""
    groups, per_group = draw(st.sampled_from([(1, 8), (2, 4), (4, 2), (4, 4), (8, 3)]))
    kept = draw(st.integers(1, groups))
    config = ModelConfig(
        hidden_size=8,
        n_routed_experts=groups * per_group,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, min(8, kept * per_group))),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gate = Gate(config, 0, None, torch.float32)
    with torch.no_grad():
        gate.weight.normal_(0, draw(st.sampled_from([0.01, 1.0])), generator=generator)
        gate.e_score_correction_bias.normal_(0, draw(st.sampled_from([0.0, 0.3, 10.0])), generator=generator)
    return gate, torch.randn(TOKENS, 8, generator=generator)


def choice(gate: Gate, x: Tensor) -> Tensor:
    """s + b in float64, by hand."""
    return torch.sigmoid(x.double() @ gate.weight.double().T) + gate.e_score_correction_bias.double()


@torch.no_grad()
def route_of(gate: Gate, x: Tensor, replay: Tensor | None = None) -> Route:
    return gate(x, replay)


@given(gates())
def test_a_token_gets_k_different_experts(drawn: tuple[Gate, Tensor]) -> None:
    gate, x = drawn
    route = route_of(gate, x)
    assert route.indices.shape == (TOKENS, gate.config.num_experts_per_tok) and route.indices.dtype == torch.int64
    for row in route.indices.tolist():
        assert len(set(row)) == len(row)
        assert min(row) >= 0 and max(row) < gate.config.n_routed_experts


@given(gates())
def test_experts_lie_in_the_best_groups(drawn: tuple[Gate, Tensor]) -> None:
    """At most topk_group groups, and none left out whose two best s + b sum to more."""
    gate, x = drawn
    c = gate.config
    size = c.n_routed_experts // c.n_group
    for row, value in zip(route_of(gate, x).indices.tolist(), choice(gate, x).tolist(), strict=True):
        sums = [sum(sorted(value[g * size : (g + 1) * size])[-2:]) for g in range(c.n_group)]
        used = {expert // size for expert in row}
        assert len(used) <= c.topk_group
        allowed = sorted(sums)[-c.topk_group]
        assert all(sums[group] >= allowed - 1e-5 for group in used)


@given(gates())
def test_no_better_expert_is_left_out(drawn: tuple[Gate, Tensor]) -> None:
    """Within the kept groups every chosen s + b is at least every other (eq. 16)."""
    gate, x = drawn
    c = gate.config
    size = c.n_routed_experts // c.n_group
    for row, value in zip(route_of(gate, x).indices.tolist(), choice(gate, x).tolist(), strict=True):
        sums = [sum(sorted(value[g * size : (g + 1) * size])[-2:]) for g in range(c.n_group)]
        certain = {g for g in range(c.n_group) if sums[g] > sorted([*sums, float("-inf")])[-c.topk_group - 1] + 1e-5}
        others = [value[e] for e in range(c.n_routed_experts) if e // size in certain and e not in row]
        assert min(value[e] for e in row) >= max(others, default=float("-inf")) - 1e-5


@given(gates())
def test_gate_values_are_without_the_bias(drawn: tuple[Gate, Tensor]) -> None:
    """Values are s of the chosen, over their sum if normalised, times the factor (eq. 13); b appears nowhere."""
    gate, x = drawn
    c = gate.config
    route = route_of(gate, x)
    s = torch.sigmoid(x.double() @ gate.weight.double().T)
    torch.testing.assert_close(route.scores.double(), s, rtol=1e-5, atol=1e-7)
    expected = s.gather(1, route.indices)
    if c.norm_topk_prob:
        expected = expected / expected.sum(-1, keepdim=True)
        total = torch.full((TOKENS,), c.routed_scaling_factor)
        torch.testing.assert_close(route.weights.sum(-1), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(route.weights.double(), expected * c.routed_scaling_factor, rtol=1e-5, atol=1e-7)


def test_the_bias_changes_the_choice(tiny_model: Callable[..., Transformer]) -> None:
    """A large enough bias puts an expert into every token's choice, a large negative one takes it out."""
    gate = tiny_model(n_group=1, topk_group=1).layers[1].mlp.gate
    x = torch.randn(50, 32)
    for bias, expected in ((5.0, 50), (-5.0, 0)):
        gate.e_score_correction_bias.zero_()[3] = bias
        assert int(load_counts(route_of(gate, x))[3]) == expected


def test_v2_scores_a_group_by_its_best(tiny_model: Callable[..., Transformer]) -> None:
    """group_limited_greedy takes the group of the single best expert, noaux_tc that of the two best together."""
    scores = torch.tensor([0.50, 0.01, 0.30, 0.29])  # groups (0, 1) and (2, 3)
    for method, expected in (("group_limited_greedy", {0, 1}), ("noaux_tc", {2, 3})):
        changes = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
        gate = tiny_model(topk_method=method, **changes).layers[1].mlp.gate
        with torch.no_grad():
            gate.weight.zero_()[:, 0] = scores.logit()
            if gate.e_score_correction_bias is not None:
                gate.e_score_correction_bias.zero_()
        assert set(route_of(gate, torch.eye(32)[:1]).indices[0].tolist()) == expected


def test_no_gradient_through_the_choice(tiny_model: Callable[..., Transformer]) -> None:
    """b is a buffer, not a parameter; scores and gate values carry the gradient."""
    gate = tiny_model().layers[1].mlp.gate
    route = gate(torch.randn(5, 32))
    assert [name for name, _ in gate.named_parameters()] == ["weight"]
    assert not gate.e_score_correction_bias.requires_grad
    assert route.scores.requires_grad and route.weights.requires_grad and not route.indices.requires_grad


@pytest.mark.parametrize("mtp", [0, 2])
def test_replay(mtp: int, tiny_model: Callable[..., Transformer], tiny_tokens: Tensor) -> None:
    """Recorded routes reproduce the output bit for bit; routes of other tokens are obeyed, MTP's modules included."""
    model = tiny_model(num_nextn_predict_layers=mtp)

    def run(text: Tensor, replay: dict[int, Tensor] | None) -> tuple[list[Tensor], dict[int, Tensor]]:
        hidden, routes = model.hidden(text[:, : 20 - mtp], replay=replay)
        states, ahead = model.predict_ahead(hidden, text[:, 1:], replay=replay)
        return [hidden, *states], {route.layer: route.indices for route in routes + ahead}

    with torch.no_grad():
        outputs, recorded = run(tiny_tokens, None)
        assert sorted(recorded) == [1, 2, *range(3, 3 + mtp)]
        replayed, again = run(tiny_tokens, recorded)
        assert all(torch.equal(a, b) for a, b in zip(outputs, replayed, strict=True))
        assert all(torch.equal(recorded[layer], again[layer]) for layer in recorded)

        _, others = run(tiny_tokens.flip(1), None)
        obeyed, used = run(tiny_tokens, others)
        assert all(torch.equal(others[layer], used[layer]) for layer in others)
        assert not any(torch.equal(a, b) for a, b in zip(outputs, obeyed, strict=True))


def test_replayed_values_keep_their_gradient(tiny_model: Callable[..., Transformer], tiny_tokens: Tensor) -> None:
    """Under replay the gate still learns: its values are computed anew."""
    model = tiny_model()
    _, routes = model.hidden(tiny_tokens)
    hidden, _ = model.hidden(tiny_tokens, replay={route.layer: route.indices for route in routes})
    hidden.square().mean().backward()
    assert model.layers[1].mlp.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("k", [1, 3, 8])
def test_no_token_is_dropped(k: int, tiny_model: Callable[..., Transformer]) -> None:
    """All K experts of every token contribute, even when every token wants the same ones."""
    model = tiny_model(num_experts_per_tok=k, n_group=1, topk_group=1, n_shared_experts=0, norm_topk_prob=False)
    moe = model.layers[1].mlp
    assert isinstance(moe, MoE)
    moe.gate.e_score_correction_bias.copy_(torch.arange(8) * 10.0)  # the last k experts take everything
    x = torch.randn(40, 32)
    with torch.no_grad():
        out, route = moe(x)
        counts = load_counts(route)
        assert counts.dtype == torch.int64 and counts.tolist() == [0] * (8 - k) + [40] * k
        alone = []  # what each choice adds by itself
        for choice_ in range(k):
            weights = torch.zeros_like(route.weights)
            weights[:, choice_] = route.weights[:, choice_]
            alone.append(moe.experts(x, route._replace(weights=weights)))
    assert all((part.abs().amax(-1) > 1e-3).all() for part in alone)
    torch.testing.assert_close(out, torch.stack(alone).sum(0), rtol=1e-5, atol=1e-5)
