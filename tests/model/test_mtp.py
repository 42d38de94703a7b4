"""Multi-token prediction (2.2): eq. 21 to 24 written out, transformers' MTP layers, and serving's cached form."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from leanseek.model import Transformer

TOLERANCE = 1e-5
LENGTH = 15


@pytest.mark.parametrize("depth", [1, 2])
def test_agrees_with_transformers(depth: int, tiny_config, randomise, decided, relative) -> None:
    """Fed the true next tokens, depth k's logits are those of transformers' MTP layer k; whole batches of them."""
    # transformers' MTP blocks always have experts, so ours must too
    config = tiny_config(num_nextn_predict_layers=depth)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    skipped = ("rope_theta", "rope_scaling", "attention", "head_dim", "model_type", "num_key_value_heads")
    values = {key: value for key, value in vars(config).items() if key not in skipped}
    main = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(**values, num_key_value_heads=config.num_attention_heads, rope_parameters=rope),
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    peer = MtpModel(main, depth).eval()
    randomise(main, seed=0)
    randomise(peer.layers, seed=1)

    model = Transformer(config)
    state = {name.removeprefix("model."): tensor for name, tensor in main.state_dict().items()}
    for name, tensor in peer.layers.state_dict().items():
        state["mtp." + name.replace("mtp_block", "block").replace("post_norm", "norm")] = tensor
    model.load_state_dict(state)

    tokens = decided(model, 2, LENGTH + depth)
    with torch.no_grad():
        theirs = main.model(tokens[:, :LENGTH]).last_hidden_state
        ours, _ = model.hidden(tokens[:, :LENGTH])
        states, routes = model.predict_ahead(ours, tokens[:, 1:])
        assert len(states) == len(routes) == depth
        for k in range(depth):
            after = tokens[:, k + 1 : k + 1 + LENGTH]
            positions = torch.arange(k + 1, k + 1 + LENGTH)[None]  # only differences of positions matter to RoPE
            theirs = peer.forward_layer(k, theirs, positions, None, input_ids=after)
            assert relative(states[k], theirs) <= TOLERANCE
            assert relative(model.head(states[k]), main.lm_head(theirs)) <= TOLERANCE


CASES = {
    "v3": {},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "dense": {"n_routed_experts": 0},
    "dense-main-model": {"first_k_dense_replace": 3},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_is_equations_21_to_24(case: str, depth: int, tiny_model, oracle, decided, relative) -> None:
    """Hidden states, then eq. 24's loss: the mean over tokens of -log p(token i + k + 1), then the mean over depths."""
    model = tiny_model(num_nextn_predict_layers=depth, **CASES[case])
    tokens = decided(model, 2, LENGTH + depth + 1)
    with torch.no_grad():
        hidden, _ = model.hidden(tokens[:, :LENGTH])
        states, routes = model.predict_ahead(hidden, tokens[:, 1 : LENGTH + depth])
    assert [route.layer for route in routes] == ([] if case == "dense" else [3 + k for k in range(depth)])
    reference = oracle(model)
    expected = [reference.ahead(row, LENGTH) for row in tokens]
    losses, expected_losses = [], []
    for k in range(1, depth + 1):
        theirs = torch.stack([expected[row][k - 1] for row in range(2)])
        assert relative(states[k - 1], theirs) <= TOLERANCE
        targets = tokens[:, k + 1 : k + 1 + LENGTH]
        losses.append(model.head(states[k - 1], targets))
        chances = (theirs @ reference.head.T).softmax(-1)  # eq. 23
        expected_losses.append(-chances.gather(-1, targets[..., None]).log().mean())  # eq. 24
    assert relative(torch.stack(losses), torch.stack(expected_losses)) <= TOLERANCE


def test_gradients_reach_the_shared_weights(tiny_model, tiny_tokens) -> None:
    """The MTP loss alone trains the embedding, the head, the main layers and every weight of its own modules."""
    model = tiny_model(num_nextn_predict_layers=2, tie_word_embeddings=False)
    hidden, _ = model.hidden(tiny_tokens[:, :-3])
    states, _ = model.predict_ahead(hidden, tiny_tokens[:, 1:-1])
    loss = F.cross_entropy(model.head(states[1]).flatten(0, 1), tiny_tokens[:, 3:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_module_sees_no_token_after_its_own(tiny_model, tiny_tokens) -> None:
    """Depth k at token i depends on token i + k and not on token i + k + 1, which it predicts."""
    model = tiny_model(num_nextn_predict_layers=2)
    changed = tiny_tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 96
    with torch.no_grad():
        before, _ = model.predict_ahead(model.hidden(tiny_tokens[:, :-2])[0], tiny_tokens[:, 1:])
        after, _ = model.predict_ahead(model.hidden(changed[:, :-2])[0], changed[:, 1:])
    for k in (1, 2):
        torch.testing.assert_close(before[k - 1][:, : 10 - k], after[k - 1][:, : 10 - k], rtol=1e-5, atol=1e-5)
        assert ((before[k - 1] - after[k - 1])[:, 10 - k].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("changes", [{}, {"attention": "gqa", "num_key_value_heads": 2}])
def test_cached_steps_agree_with_whole_sequences(changes: dict, tiny_model, decided, relative, server) -> None:
    """`step` then `step_ahead` of each depth, with each module's own cache layer, give predict_ahead's states."""
    depth = 2
    model = tiny_model(num_nextn_predict_layers=depth, **changes)
    tokens = decided(model, 2, LENGTH + depth)
    with torch.no_grad():
        hidden, _ = model.hidden(tokens[:, :LENGTH])
        expected, _ = model.predict_ahead(hidden, tokens[:, 1:])
        serving = server(model, 2, LENGTH)
        main = serving.feed(list(tokens[:, :LENGTH]), [[6, 4], [2]])
        states: list[list[Tensor]] = [[], []]
        for start, stop in ((0, 8), (8, 9), (9, LENGTH)):  # a prefill, a token, a chunk: each through all depths
            index = serving.index({0: stop - start, 1: stop - start}, {0: start, 1: start})
            rows = torch.cat([main[s][start:stop] for s in range(2)])
            for k in range(1, depth + 1):
                after = torch.cat([tokens[s, start + k : stop + k] for s in range(2)])
                rows = model.step_ahead(k, rows, after, serving.cache, index)
                states[k - 1].append(rows.view(2, stop - start, -1))
    for mine, theirs in zip(states, expected, strict=True):
        assert relative(torch.cat(mine, 1), theirs) <= TOLERANCE
