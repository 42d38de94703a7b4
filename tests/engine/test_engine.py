"""The engine's tokens are the model's own, whatever the batch, chunks, pages, prefixes and drafts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanseek import Transformer, checkpoint
from leanseek.engine import Engine, EngineError, Request, SamplingParams
from leanseek.ops import FP8_BLOCKS

GREEDY = SamplingParams(temperature=0, max_tokens=20)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"speculate": 0},
    "chunks of 16": {"speculate": 0, "step_tokens": 16},
    "pages of 1": {"speculate": 1, "page_size": 1},
    "batch of 2": {"speculate": 0, "max_batch": 2},
    "1 draft": {"speculate": 1},
    "3 drafts in chunks": {"speculate": 3, "step_tokens": 16, "page_size": 4},
    "no prefix cache": {"prefix_cache": False},
}


def continued(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by the whole forward, no cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_greedy_tokens_are_the_whole_forwards(
    model: Transformer, prompts: list[list[int]], make_engine: Callable, serve: Callable, settings: dict[str, Any]
) -> None:
    expected = [continued(model, prompt, 20) for prompt in prompts]
    assert serve(make_engine(model, **settings), prompts, GREEDY) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
        {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
        {"n_routed_experts": 0, "n_shared_experts": 0, "tie_word_embeddings": True},
        {"attention": "gqa", "num_key_value_heads": 2},
    ],
    ids=["no q_lora", "v2 routing", "dense and tied", "gqa baseline"],
)
def test_other_networks_of_the_family(
    make_model: Callable, prompts: list[list[int]], make_engine: Callable, serve: Callable, changes: dict[str, Any]
) -> None:
    model = make_model(seed=3, **changes)
    expected = [continued(model, prompt, 12) for prompt in prompts]
    assert serve(make_engine(model), prompts, SamplingParams(temperature=0, max_tokens=12)) == expected


def test_greedy_tokens_are_transformers(
    make_model: Callable, prompts: list[list[int]], make_engine: Callable, serve: Callable, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(seed=4, num_nextn_predict_layers=0)
    checkpoint.save(model, tmp_path / "model")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for prompt, ours in zip(prompts, serve(make_engine(model, step_tokens=32), prompts, GREEDY), strict=True):
        ids = torch.tensor([prompt])
        theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert ours == theirs[0, len(prompt) :].tolist()


def test_bfloat16_and_fp8_weights_stay_as_stored(
    make_model: Callable, make_engine: Callable, serve: Callable, tmp_path: Path
) -> None:
    """A folder in FP8 blocks is served from FP8 weights, and gives what its dequantised form gives."""
    every = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}  # so that no rounding changes the choice
    model = make_model(seed=5, hidden_size=128, moe_intermediate_size=128, num_nextn_predict_layers=0, **every)
    checkpoint.save(model, tmp_path / "fp8", format="hf-fp8")
    stored = checkpoint.load(tmp_path / "fp8", keep_fp8=True).requires_grad_(False)
    wide = checkpoint.load(tmp_path / "fp8").requires_grad_(False)
    assert stored.layers[1].mlp.experts.gate_up_proj.format == FP8_BLOCKS
    assert wide.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    prompts = [list(range(start, start + 20)) for start in range(10, 60, 5)]
    found = [first_logprobs(make_engine(each), prompts, token=7) for each in (stored, wide)]
    assert found[0] == pytest.approx(found[1], abs=0.3)  # they lie between -9 and -5


def first_logprobs(engine: Engine, prompts: list[list[int]], token: int) -> list[float]:
    """What the model says of `token` as the first after each prompt: all are made to write it."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, logit_bias={token: 100.0})
    found: dict[str, float] = {}
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, params))
    while engine.has_work():
        found |= {delta.request_id: delta.logprobs[0].logprob for delta in engine.step() if delta.logprobs}
    return [found[str(i)] for i in range(len(prompts))]


def test_pool_exhaustion_preempts_and_completes_all(
    model: Transformer, prompts: list[list[int]], make_engine: Callable, serve: Callable, cache_gib: Callable
) -> None:
    """Five requests of 171 tokens together in a cache of 120."""
    expected = serve(make_engine(model), prompts, GREEDY)
    engine = make_engine(model, page_size=4, cache_gib=cache_gib(124))
    assert serve(engine, prompts, GREEDY) == expected
    assert engine.stats().preemptions > 0
    assert engine.stats().pages_used == 0


def test_cache_budget_is_kept_to_the_byte(model: Transformer, make_engine: Callable, cache_gib: Callable) -> None:
    engine = make_engine(model, cache_gib=cache_gib(1000))
    assert engine.stats().cache_bytes <= cache_gib(1000) * 2**30
    width = (16 + 4) * 4
    assert engine.kv_bytes_per_token == width * 2
    assert engine.stats().cache_bytes == (engine.stats().pages_total + 1) * 16 * width * 3  # MTP's layer, a spare page


def test_a_shared_prefix_is_computed_once(model: Transformer, make_engine: Callable, serve: Callable) -> None:
    engine = make_engine(model, page_size=4, seed=0)
    prompt = list(range(2, 40))
    first = serve(engine, [prompt], GREEDY)
    engine.add(Request("again", prompt, GREEDY))
    deltas = [delta for _ in range(40) for delta in engine.step()]
    assert [token for delta in deltas for token in delta.token_ids] == first[0]
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.cached_tokens == 36  # whole pages that leave a token to compute
    assert deltas[-1].usage.prompt_tokens == 38


def test_output_is_found_in_the_cache_by_the_next_turn(
    model: Transformer, make_engine: Callable, serve: Callable
) -> None:
    engine = make_engine(model, page_size=4)
    prompt = list(range(2, 23))
    answer = serve(engine, [prompt], GREEDY)[0]
    follow_up = [*prompt, *answer, 7, 8, 9]
    expected = serve(make_engine(model, page_size=4), [follow_up], GREEDY)
    assert serve(engine, [follow_up], GREEDY) == expected
    assert engine.stats().cached_tokens == 40  # of 41 + 3: all but the last token of the answer were computed


def test_choices_share_the_pages_of_their_prompt(model: Transformer, make_engine: Callable) -> None:
    engine = make_engine(model, page_size=4, speculate=0)
    engine.add(Request("r", list(range(2, 42)), SamplingParams(n=8, seed=1, max_tokens=4)))
    most = 0
    while engine.has_work():
        engine.step()
        engine.check_invariants()
        most = max(most, engine.stats().pages_used)
    assert most <= 10 + 8 * 2  # the prompt's pages once, and up to two for each choice's own tokens
    assert engine.stats().finished == {"length": 8}


def test_end_of_sequence_and_stop_ids(
    model: Transformer, prompts: list[list[int]], make_engine: Callable, serve: Callable
) -> None:
    tokens = serve(make_engine(model), [prompts[1]], GREEDY)[0]
    engine = make_engine(model, eos_token_ids=[tokens[5]])
    stop = tokens.index(tokens[5]) + 1
    assert serve(engine, [prompts[1]], GREEDY)[0] == tokens[:stop]
    ignoring = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    assert serve(engine, [prompts[1]], ignoring)[0] == tokens
    by_id = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[tokens[3]])
    engine = make_engine(model)
    engine.add(Request("r", prompts[1], by_id))
    last = [delta for _ in range(30) for delta in engine.step()][-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", tokens[3])


def test_min_tokens_holds_the_end_back(
    model: Transformer, prompts: list[list[int]], make_engine: Callable, serve: Callable
) -> None:
    tokens = serve(make_engine(model), [prompts[1]], GREEDY)[0]
    for drafts in (0, 2):
        engine = make_engine(model, eos_token_ids=[tokens[0]], speculate=drafts)
        params = SamplingParams(temperature=0, max_tokens=20, min_tokens=4)
        out = serve(engine, [prompts[1]], params)[0]
        assert len(out) >= 4
        assert tokens[0] not in out[:4]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([400], {}, "outside the vocabulary"),
        ([-1], {}, "outside the vocabulary"),
        ([5] * 600, {}, "the context is 512"),
        ([5] * 500, {"max_tokens": 13}, "exceed the context of 512"),
        ([5], {"logit_bias": {320: 1.0}}, "logit_bias"),
        ([5], {"stop": "x"}, "tokenizer.json"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    model: Transformer, make_engine: Callable, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    engine = make_engine(model)
    with pytest.raises(EngineError, match=message) as caught:
        engine.add(Request("r", prompt, SamplingParams(**params)))
    assert "\n" not in str(caught.value)
    assert not engine.has_work()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_gib": 1e-9}, "cache_gib is too small"),
        ({"max_model_len": 513}, "max_model_len"),
        ({"page_size": 0}, "page_size"),
        ({"speculate": -1}, "speculate"),
    ],
)
def test_options_that_cannot_be(
    model: Transformer, make_engine: Callable, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        make_engine(model, **options)
    with pytest.raises(EngineError, match="MTP"):
        make_engine(
            Transformer(model.config.__class__(**vars(model.config) | {"num_nextn_predict_layers": 0})), speculate=1
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"min_p": 2},
        {"n": 0},
        {"n": True},
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"min_tokens": 5, "max_tokens": 4},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-46},
        {"repetition_penalty": 1e300},
        {"temperature": 1e30},
        {"temperature": 10**400},
        {"top_p": 1e-46},
        {"top_k": -(10**400)},
        {"frequency_penalty": -1e300},
        {"logit_bias": {1: 1e300}},
        {"logit_bias": {1: 10**400}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {True: 1.0}},
        {"stop_token_ids": ["8"]},
        {"stop_token_ids": [1.5]},
        {"presence_penalty": 3},
        {"logit_bias": {1: 101}},
        {"logprobs": 21},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"seed": "x"},
    ],
)
def test_wrong_sampling_params(wrong: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        SamplingParams(**wrong)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120
