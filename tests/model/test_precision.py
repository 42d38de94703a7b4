"""BF16 activations over FP32 weights, recomputation, and what must stay FP32 whatever the model is cast to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from leanseek.config import YarnConfig
from leanseek.model import Transformer

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to-device-and-dtype": lambda m: m.to("cpu", torch.bfloat16),
    "double": lambda m: m.double(),
    "twice": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_bias_and_frequencies_stay_float32(cast: str, tiny_model: Callable[..., Transformer]) -> None:
    """Not merely of that dtype again: not one bit of them is rounded, MTP's included."""
    model = tiny_model(num_nextn_predict_layers=1)
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert sum("e_score_correction_bias" in name for name in exact) == 3 and "rotary.inv_freq" in exact
    CASTS[cast](model)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, exact[name]), name


def test_meta_model_keeps_its_frequencies(tiny_config) -> None:
    """A network made without memory and then given some: the frequencies are configuration, and are there."""
    config = tiny_config(rope_scaling=YarnConfig(4, 16, mscale_all_dim=1.0))
    real = Transformer(config)
    expected = real.rotary.inv_freq.clone()
    models = [Transformer(config, device="meta"), Transformer(config, device=torch.device("meta")), real.to("meta")]
    with torch.device("meta"):
        models.append(Transformer(config))
    for model in models:
        assert all(parameter.is_meta for parameter in model.parameters())
        model.to_empty(device="cpu")
        assert torch.equal(model.rotary.inv_freq, expected)


def test_frequencies_are_not_in_the_state(tiny_model: Callable[..., Transformer]) -> None:
    """A checkpoint holds weights and biases; frequencies come from the config."""
    assert not [name for name in tiny_model().state_dict() if "rotary" in name or "inv_freq" in name]


def test_bf16_activations(tiny_model, tiny_tokens, relative) -> None:
    """With the same experts, BF16 activations stay within their rounding of FP32; weights' gradients are FP32."""
    model = tiny_model(num_nextn_predict_layers=1)
    hidden, routes = model.hidden(tiny_tokens[:, :-1])
    (ahead,), more = model.predict_ahead(hidden, tiny_tokens[:, 1:])
    replay = {route.layer: route.indices for route in routes + more}
    hidden16, routes16 = model.hidden(tiny_tokens[:, :-1], dtype=torch.bfloat16, replay=replay)
    (ahead16,), more16 = model.predict_ahead(hidden16, tiny_tokens[:, 1:], replay=replay)
    for narrow, wide in ((hidden16, hidden), (ahead16, ahead)):
        assert narrow.dtype == torch.bfloat16
        assert 0 < relative(narrow, wide) < 0.05
    for route in routes16 + more16:
        assert route.scores.dtype == route.weights.dtype == torch.float32  # the gate is never BF16
    loss = model.head(hidden16, tiny_tokens[:, 1:])
    assert loss.dtype == torch.float32
    loss.backward()
    narrow_gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.head(hidden, tiny_tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("mtp."):
            gradient = narrow_gradients[name]
            assert gradient is not None and gradient.dtype == torch.float32
            cosine = torch.cosine_similarity(gradient.flatten(), parameter.grad.flatten(), dim=0)
            assert cosine > 0.99, name


def test_bf16_model(tiny_model, tiny_tokens, relative, server) -> None:
    """A model cast to BF16 whole, as served: forward and cached steps near FP32, the router's scores still FP32."""
    # every expert is used, so that rounding cannot change the choice
    model = tiny_model(n_group=1, topk_group=1, num_experts_per_tok=8)
    with torch.no_grad():
        expected = model(tiny_tokens)
        model.bfloat16()
        logits = model(tiny_tokens)
        assert logits.dtype == torch.bfloat16
        assert relative(logits, expected) < 0.06
        serving = server(model, 2, 20)
        serving.cache = serving.cache.bfloat16()
        for row, hidden in enumerate(serving.feed(list(tiny_tokens), [[9], [4, 8]])):
            assert relative(model.head(hidden), expected[row]) < 0.06


CONFIGS = {
    "v3": {},
    "no-q-lora": {"q_lora_rank": None},
    "gqa": {"attention": "gqa"},
    "mtp": {"num_nextn_predict_layers": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CONFIGS)
def test_recomputation_changes_no_bit(case: str, dtype: torch.dtype, tiny_model, tiny_tokens) -> None:
    """Loss and gradients with recompute=True are those without, and the routes come once."""
    model = tiny_model(**CONFIGS[case])

    def run(recompute: bool) -> tuple[Tensor, dict[str, Tensor], int]:
        model.zero_grad()
        hidden, routes = model.hidden(tiny_tokens[:, :-2], dtype=dtype, recompute=recompute)
        states, ahead = model.predict_ahead(hidden, tiny_tokens[:, 1:], recompute=recompute)
        loss = sum(model.head(h).float().logsumexp(-1).mean() for h in (hidden, *states))
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, len(routes + ahead)

    loss, gradients, routes = run(False)
    loss_again, gradients_again, routes_again = run(True)
    assert torch.equal(loss, loss_again) and routes == routes_again
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


def test_recomputation_keeps_less(tiny_model, tiny_tokens) -> None:
    """The expanded queries, keys and values are not among what backward keeps."""
    model = tiny_model(num_attention_heads=16, n_routed_experts=0)

    def kept(recompute: bool) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.hidden(tiny_tokens, recompute=recompute)[0].sum()
        assert output.requires_grad  # alive until here, so that no storage's address was reused
        return sum(storages.values())

    assert kept(True) < kept(False)


def test_initial_weights(tiny_config) -> None:
    """4.2: matrices normal with std initializer_range, norms one, biases zero; the same seed, the same bits."""
    config = tiny_config(num_nextn_predict_layers=1, initializer_range=0.006)
    model, again = (Transformer(config).init_weights(3) for _ in range(2))
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith("e_score_correction_bias"):
            assert (tensor == 0).all(), name
        else:
            assert 0.8 * 0.006 < float(tensor.std()) < 1.2 * 0.006, name
