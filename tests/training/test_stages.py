"""A network in parts gives what the whole gives: stages of a pipeline, and modules whose weights hooks gather."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from leanseek import ModelConfig, Transformer
from leanseek.model import Stage
from leanseek.training.objective import Losses, losses
from tests.small import NETWORK

MODEL = ModelConfig(
    **NETWORK | {"vocab_size": 67, "num_hidden_layers": 4, "n_routed_experts": 8, "initializer_range": 0.1},
    num_nextn_predict_layers=2,
)
TOKENS = torch.randint(0, 67, (3, 12 + 3), generator=torch.Generator().manual_seed(1))
LOSS = {"share": 0.5, "mtp_weight": 0.3, "sequence_alpha": 0.5, "dtype": torch.bfloat16}


@pytest.fixture(params=["own head", "tied"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return dataclasses.replace(MODEL, tie_word_embeddings=request.param == "tied")


def whole(config: ModelConfig, recompute: bool = False) -> tuple[Losses, dict[str, torch.Tensor]]:
    """Losses and gradients of half a batch, say, of the network in one piece."""
    model = Transformer(config).init_weights(5)
    found = losses(model, TOKENS, recompute=recompute, **LOSS)
    found.backward()
    return found, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("cuts", [(2,), (1, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_stages_one_after_the_other_are_the_whole(config: ModelConfig, cuts: tuple[int, ...], recompute: bool) -> None:
    """Losses and gradients to the bit, each stage's weights drawn by itself; also where a stage holds no layer."""
    expected, gradients = whole(config, recompute)
    ends = [0, *cuts, config.num_hidden_layers]
    parts = [Stage(range(a, b), i == 0, i == len(cuts)) for i, (a, b) in enumerate(pairwise(ends))]
    stages = [Transformer(config, stages=[part]).init_weights(5) for part in parts]
    found: list[Losses] = []
    handed = []  # what each stage but the first received
    for stage in stages:
        hidden = None
        if found:
            hidden = found[-1].hidden.detach().requires_grad_()
            handed.append(hidden)
        found.append(losses(stage, TOKENS, hidden, recompute=recompute, **LOSS))
    got: dict[str, torch.Tensor] = {}
    for i in reversed(range(len(stages))):
        found[i].backward(handed[i].grad if i + 1 < len(stages) else None)
        for name, p in stages[i].named_parameters():
            got[name] = got[name] + p.grad if name in got else p.grad  # an embedding at both ends
    assert got.keys() == gradients.keys()
    assert not [name for name, gradient in gradients.items() if not torch.equal(got[name], gradient)]
    last = found[-1]
    assert torch.equal(last.main, expected.main) and torch.equal(last.mtp, expected.mtp) and last.hidden is None
    assert float(sum(f.balance.detach() for f in found)) == pytest.approx(float(expected.balance.detach()), rel=1e-6)
    assert [r.layer for f in found for r in f.routes] == [r.layer for r in expected.routes] == [1, 2, 3, 4, 5]


def test_one_module_runs_the_first_and_the_last_stage(config: ModelConfig) -> None:
    """The V layout: one rank holds both ends and so one embedding, whose gradient is the whole network's."""
    expected, gradients = whole(config)
    outer = Transformer(config, stages=[Stage(range(1), True, False), Stage(range(3, 4), False, True)]).init_weights(5)
    inner = Transformer(config, stages=[Stage(range(1, 2), False, False), Stage(range(2, 3), False, False)])
    inner.init_weights(5)
    route = [(outer, 0), (inner, 0), (inner, 1), (outer, 1)]
    found: list[Losses] = []
    handed: list[torch.Tensor | None] = [None]
    for model, stage in route:
        found.append(losses(model, TOKENS, handed[-1], stage=stage, **LOSS))
        if found[-1].hidden is not None:
            handed.append(found[-1].hidden.detach().requires_grad_())
    for place in reversed(range(4)):
        found[place].backward(handed[place + 1].grad if place < 3 else None)
    got = {name: p.grad for model in (outer, inner) for name, p in model.named_parameters()}
    assert got.keys() == gradients.keys()
    assert torch.equal(found[-1].main, expected.main) and torch.equal(found[-1].mtp, expected.mtp)
    assert not [name for name, gradient in gradients.items() if not torch.allclose(got[name], gradient, atol=1e-6)]


def test_a_part_of_the_experts_is_drawn_as_the_whole_would_be(config: ModelConfig) -> None:
    state = Transformer(config).init_weights(5).state_dict()
    part = Transformer(config, experts=range(2, 5)).init_weights(5).state_dict()
    assert part.keys() == state.keys()
    for name, value in part.items():
        expected = state[name][2:5] if ".experts." in name else state[name]
        assert torch.equal(value, expected), name


def test_a_stage_holds_what_it_says(config: ModelConfig) -> None:
    """Names and values are the whole network's; a middle stage has neither end, and gives its hidden state."""
    state = Transformer(config).init_weights(5).state_dict()
    middle = Transformer(config, stages=[Stage(range(1, 3), False, False)]).init_weights(5)
    names = [name for name in state if name.startswith(("layers.1.", "layers.2."))]
    assert sorted(middle.state_dict()) == sorted(names)
    assert all(torch.equal(middle.state_dict()[name], state[name]) for name in names)
    assert middle.layers[2] is list(middle.layers)[1]
    hidden = torch.randn(2, 5, config.hidden_size)
    assert torch.equal(middle(hidden), middle.hidden(hidden)[0])


def test_the_balance_loss_reaches_a_stage_without_a_head() -> None:
    """Its gradients come from the stage's own losses, whatever the next stage sends."""
    first = Transformer(MODEL, stages=[Stage(range(3), True, False)]).init_weights(5)
    found = losses(first, TOKENS, sequence_alpha=0.5)
    found.backward(torch.zeros_like(found.hidden))
    assert all(first.layers[i].mlp.gate.weight.grad.abs().max() > 0 for i in (1, 2))
    quiet = Transformer(MODEL, stages=[Stage(range(3), True, False)]).init_weights(5)
    found = losses(quiet, TOKENS)
    found.backward(torch.zeros_like(found.hidden))
    assert all(quiet.layers[i].mlp.gate.weight.grad.abs().max() == 0 for i in (1, 2))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
def test_fully_shard_trains_alike(config: ModelConfig, one_rank: None, recompute: bool) -> None:
    """FSDP2 gathers a module's weights when its forward is called: every weight is read within one, the head's too."""
    expected, gradients = whole(config, recompute)
    model = Transformer(config).init_weights(5)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for module in (*model.layers, *model.mtp, *([] if model.lm_head is None else [model.lm_head]), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    found = losses(model, TOKENS, recompute=recompute, **LOSS)
    found.backward()
    assert torch.equal(found.total, expected.total)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad.to_local(), gradients[name]), name
