"""A GRPO run: what it trains on, what it says of itself, and that it repeats itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from leanseek import load
from leanseek.backends import StepBackend
from leanseek.backends.protocol import Trace, trace
from leanseek.cli import app
from leanseek.config import ConfigError
from leanseek.engine import Tokenizer
from leanseek.posttraining import forward
from leanseek.posttraining.grpo import RolloutFeed, Sample, grpo
from leanseek.posttraining.grpo_config import GRPORun
from leanseek.posttraining.references import References
from leanseek.training.metrics import read_rows
from leanseek.training.part import Part
from leanseek.training.report import write_report
from leanseek.training.trainer import StepResult, Trainer
from tests.small import rewound

pytestmark = pytest.mark.usefixtures("quick_runs")

Make = Callable[..., GRPORun]


@pytest.fixture
def opened(tmp_path: Path, policy_folder: Path) -> Callable[[GRPORun], tuple[RolloutFeed, Trainer]]:
    """A run's feed and trainer, before the first step."""

    def make(run: GRPORun) -> tuple[RolloutFeed, Trainer]:
        folder = tmp_path / "opened"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        feed = RolloutFeed(run, Part(), folder, None)
        trainer = Trainer(run, load(policy_folder), objective=feed.objective)
        feed.attach(trainer)
        return feed, trainer

    return make


def rows_of(folder: Path, key: str) -> list[Any]:
    return [row[key] for row in read_rows(folder / "metrics.jsonl") if key in row]


def test_a_run_and_its_files(make_run: Make, tmp_path: Path) -> None:
    run = make_run("grpo.pass_k=2", rewards=("vowels", "short"))
    grpo(run, runs=tmp_path)
    folder = tmp_path / run.name
    assert GRPORun.from_dict(tomllib.loads((folder / "config.toml").read_text())) == run
    steps = [row for row in read_rows(folder / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    wanted = ("reward/vowels", "completion_length", "entropy", "kl", "ratio_max", "no_spread", "cut_off", "clipped")
    assert all(key in row for row in steps for key in (*wanted, "rollout_tokens_per_second", "train_tokens_per_second"))
    assert all(row["ratio_max"] == row["ratio_mean"] == 1.0 and row["mismatch"] == 0 for row in steps)
    assert all(0 <= value <= 1 for key in ("pass_at_1", "pass_at_2") for value in rows_of(folder, key))
    said = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(said) == 36 and {row["step"] for row in said} == {1, 2, 3}
    first = said[:12]
    assert steps[0]["reward"] == pytest.approx(sum(row["reward"] for row in first) / 12)
    assert sum(row["advantage"] for row in said[:4]) == pytest.approx(0, abs=1e-12)
    assert any(row["rewards"]["short"] is None for row in said)  # an abstention is none, not 0
    assert load(folder).config.eos_token_ids == (0,) and (folder / "checkpoints/step-3/tokenizer.json").is_file()


def test_learning_rate_0_for_50_steps(make_run: Make, opened: Callable) -> None:
    """open-instruct#1473: the mismatch stays 0, and every ratio 1."""
    feed, trainer = opened(make_run("train.batch_size=4", "train.steps=60", "optimizer.lr=1e-30", "grpo.held_out=''"))
    for step in range(50):
        trainer.step(feed.batch(step), step)
        found = trainer.objective.figures()
        assert found["mismatch"] == 0 and found["ratio_max"] == found["ratio_mean"] == 1.0, step


def test_the_reward_rises(make_run: Make, opened: Callable) -> None:
    feed, trainer = opened(make_run("train.batch_size=32", "train.steps=30", "optimizer.lr=1e-2", "grpo.group=8"))
    rewards = []
    for step in range(12):
        trainer.step(feed.batch(step), step)
        rewards.append(feed.figures()["reward"])
        assert trainer.objective.figures()["mismatch"] == 0
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3


def _state(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".safetensors",)}


@pytest.mark.parametrize("moved", [(), ("grpo.beta=0.1", "grpo.reference_every=2", "balance.bias_update_speed=0.01")])
def test_a_killed_run_repeats_itself(moved: tuple[str, ...], make_run: Make, tmp_path: Path) -> None:
    """Bit for bit, rollouts included: killed in the middle of what is trained on one rollout, and between two; and with a
    reference that is replaced (trl#5312, open-instruct#1627: the weights reach the sampler after a resume too)."""
    run = make_run("grpo.epochs=2", "train.steps=4", "grpo.held_out=''", *moved)
    grpo(run, runs=tmp_path / "whole")
    whole = tmp_path / "whole" / run.name
    ratios = rows_of(whole, "mismatch")
    assert ratios[0] == ratios[2] == 0 and ratios[1] > 0 and ratios[3] > 0  # the second epoch is off-policy
    for killed in (2, 3):
        folder = rewound(whole, killed, tmp_path / f"killed-{killed}")
        grpo(run, resume=True, runs=tmp_path / f"killed-{killed}")
        assert _state(folder / "checkpoints/step-4") == _state(whole / "checkpoints/step-4")
        assert (folder / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
        for key in ("reward", "loss", "ratio_max", "entropy", "kl"):
            assert rows_of(folder, key) == rows_of(whole, key)


# ---- what is trained on ----


def test_only_the_first_steps_on_a_rollout_need_no_forward(
    make_run: Make, opened: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sampler has computed is not computed again while the weights are the same; and nothing differs by it."""
    computed = []

    def spied(backend: StepBackend, tokens: torch.Tensor, lengths: Any) -> Trace:
        computed[-1] += 1
        return trace(backend, tokens, lengths)

    monkeypatch.setattr(forward, "trace", spied)
    run, weights = make_run("grpo.epochs=2", "train.steps=4", "train.micro_batch_size=5"), []
    for room in (None, 0):
        feed, trainer = opened(run)
        feed.policy.room = feed.policy.room if room is None else room
        for step in range(4):
            computed.append(0)
            trainer.step(feed.batch(step), step)
            feed.evaluate(trainer, step)
        weights.append({name: p.clone() for name, p in trainer.model.state_dict().items()})
    assert computed == [0, 3, 0, 3, 3, 3, 3, 3]
    assert all(torch.equal(weights[1][name], p) for name, p in weights[0].items())


def test_sampled_ids_are_trained_on(make_run: Make, opened: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """trl#5224: nothing decodes completions and encodes the text again."""
    feed, trainer = opened(make_run())
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("a completion was encoded again"))
    batch = feed.batch(0)
    sampled = {(tuple(s.prompt), tuple(s.tokens)) for s in feed.rollout}
    assert batch.lengths is not None
    for row, (length,), start in zip(
        batch.tokens.tolist(), batch.lengths, batch.columns["start"].tolist(), strict=True
    ):
        assert (tuple(row[:start]), tuple(row[start : length + 1])) in sampled
    encoded = [
        s for s in feed.rollout if feed.tokenizer.inner.encode(feed.tokenizer.inner.decode(s.tokens)).ids != s.tokens
    ]
    assert encoded  # there are some for which it would make a difference
    trainer.step(batch, 0)


def step_on(feed: RolloutFeed, trainer: Trainer, samples: list[Sample]) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """A step on these samples, and the gradients before clipping."""
    held: dict[str, torch.Tensor] = {}
    clip = trainer.part.reduce

    def keep(*arguments: Any) -> Any:
        held.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return clip(*arguments)

    trainer.part.reduce = keep  # type: ignore[method-assign]
    result = trainer.step(feed._tensors(samples), 0)
    trainer.part.reduce = clip  # type: ignore[method-assign]
    return result, held


def test_the_end_token_gets_gradient(make_run: Make, opened: Callable) -> None:
    """nanochat#810: of answers that are the end token alone, the good one's becomes likelier."""
    feed, trainer = opened(make_run("optimizer.lr=1e-2"))
    prompt = feed.prompts[0][1]
    ends = [Sample(prompt, [0], [-5.0], 1.0, True)] * 4
    before = trainer.model(torch.tensor([prompt]))[0, -1].log_softmax(-1)[0].item()
    result, held = step_on(feed, trainer, ends)
    assert result.grad_norm > 0 and held["lm_head.weight"][0].norm() > 0
    assert trainer.model(torch.tensor([prompt]))[0, -1].log_softmax(-1)[0].item() > before


def test_an_end_token_stands_at_the_end_of_a_completion(make_run: Make, opened: Callable) -> None:
    feed, _ = opened(make_run("grpo.max_tokens=60", "train.batch_size=28", "grpo.group=4"))
    feed.batch(0)
    ended = [s for s in feed.rollout if s.tokens[-1] == 0]
    assert ended and all(0 not in s.tokens[:-1] for s in feed.rollout)
    assert all(len(s.tokens) == len(s.logprobs) for s in feed.rollout)


def test_a_batch_of_cut_off_answers(make_run: Make, opened: Callable) -> None:
    """trl#6369: finite, with zero gradient."""
    feed, trainer = opened(make_run("grpo.cut_off='mask'", "grpo.max_tokens=1"))
    batch = feed.batch(0)
    assert feed.figures()["cut_off"] > 0
    samples = [dataclasses.replace(s, kept=False) for s in feed.rollout]
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    result, _held = step_on(feed, trainer, samples)
    assert result.applied and result.loss == 0 and result.grad_norm == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert len(batch) == 12


def test_cut_off_answers_are_masked_or_penalised_never_both(make_run: Make, opened: Callable) -> None:
    for rule, masked, punished in (("mask", True, False), ("penalty", False, True), ("keep", False, False)):
        feed, _ = opened(make_run(f"grpo.cut_off={rule!r}", "grpo.max_tokens=6", "grpo.penalty_tokens=1"))
        feed.batch(0)
        cut = [s for s in feed.rollout if s.tokens[-1] != 0]
        assert cut and all(s.kept != masked for s in cut)
        said = [json.loads(line) for line in feed.log.path.read_text().splitlines()]
        for first in range(0, 12, 4):
            group = said[first : first + 4]
            rewards = [row["reward"] - punished * row["cut_off"] for row in group]
            mean = sum(rewards) / 4
            assert [row["advantage"] for row in group] == pytest.approx([r - mean for r in rewards], abs=1e-9)


@pytest.mark.parametrize("loss", ["paper", "dr", "dapo", "gspo"])
def test_the_same_gradient_for_any_split(loss: str, make_run: Make, opened: Callable) -> None:
    """trl#2617: micro-batches of 1, 5 and 12 completions, MTP's loss included."""
    found = []
    for size in (0, 1, 5):
        feed, trainer = opened(
            make_run(f"train.micro_batch_size={size}", f"grpo.loss={loss!r}", "mtp.weight=0.3", "grpo.beta=0.1")
        )
        feed.batch(0)
        found.append(step_on(feed, trainer, feed.rollout)[1])
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            assert (other[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_mtp_learns_beside_the_policy(make_run: Make, opened: Callable) -> None:
    """Its loss reaches its own weights alone; without weight they stay."""
    gradients = []
    for weight in (0.0, 0.5):
        feed, trainer = opened(make_run(f"mtp.weight={weight}"))
        feed.batch(0)
        gradients.append(step_on(feed, trainer, feed.rollout)[1])
    assert not any(name.startswith("mtp.") for name in gradients[0])
    assert any(gradient.norm() > 0 for name, gradient in gradients[1].items() if name.startswith("mtp."))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_biases_are_frozen_or_move_and_reach_the_sampler(make_run: Make, opened: Callable) -> None:
    for speed in (0.0, 0.05):
        feed, trainer = opened(make_run(f"balance.bias_update_speed={speed}", "balance.bias_freeze=1.0"))
        bias = trainer.model.layers[1].mlp.gate.e_score_correction_bias
        before = bias.clone()
        for step in range(2):
            trainer.step(feed.batch(step), step)
            assert trainer.objective.figures()["mismatch"] == 0
        assert torch.equal(bias, before) == (speed == 0)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_kl_to_a_reference(kl: str, make_run: Make, opened: Callable) -> None:
    """0 at first, then not; it holds the policy back; a new reference makes it 0 again."""
    far = []
    for beta in (1e-6, 5.0):
        feed, trainer = opened(
            make_run(
                f"grpo.beta={beta}", f"grpo.kl={kl!r}", "grpo.reference_every=5", "train.steps=9", "optimizer.lr=1e-2"
            )
        )
        kls = []
        for step in range(6):
            trainer.step(feed.batch(step), step)
            kls.append(trainer.objective.figures()["kl"])
        assert kls[0] == 0 and kls[5] == 0 and kls[1] != 0
        far.append(abs(kls[4]))
    assert far[1] < far[0]


def test_groups_without_spread_are_replaced(make_run: Make, opened: Callable) -> None:
    """With max_tokens = 1 many groups' rewards are all alike: refilled groups differ; else they stay with advantage 0."""
    feed, _ = opened(make_run("grpo.max_tokens=1", "grpo.group=2", "train.batch_size=4"))
    feed.batch(0)
    plain = feed.figures()["no_spread"]
    assert plain > 0 and not all(s.advantage for s in feed.rollout)
    feed, _ = opened(make_run("grpo.max_tokens=1", "grpo.group=2", "train.batch_size=4", "grpo.refill=20"))
    feed.batch(0)
    assert all(s.advantage for s in feed.rollout) and feed.position > 2 and len(feed.rollout) == 4


# ---- bad input ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.top_p=0.9", "grpo.top_p = 0.9: tokens would be drawn from another distribution"),
        ("grpo.top_k=5", "grpo.top_k = 5: tokens would be drawn from another distribution"),
        ("grpo.temperature=0.0", "grpo.temperature = 0.0 must lie in"),
        ("grpo.group=1", "grpo.group = 1 must lie between 2 and 128"),
        ("grpo.group=5", "train.batch_size = 12 is not a multiple of grpo.group = 5"),
        ("grpo.loss='ppo'", "grpo.loss = 'ppo' is not one of paper, dr, dapo, gspo"),
        ("grpo.cut_off='both'", "grpo.cut_off = 'both' is not one of mask, penalty, keep"),
        ("grpo.rollout_prompts=4", "not a multiple of train.batch_size"),
        ("grpo.solved_by='truth'", "grpo.solved_by = 'truth' is the name of no reward; there are vowels"),
        ("grpo.max_tokens=128", "leaves no room for a prompt"),
        ("balance.sequence_alpha=0.1", "losses of pre-training"),
    ],
)
def test_settings_that_cannot_be(override: str, message: str, make_run: Make) -> None:
    with pytest.raises(ConfigError, match=r"grpo|train|balance") as caught:
        make_run(override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_needs_prompts_and_rewards(make_run: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a GRPO run needs rewards: add \[\[rewards\]\]"):
        grpo(make_run(rewards=()), runs=tmp_path)
    with pytest.raises(ConfigError, match=r"needs grpo\.prompts"):
        grpo(make_run("grpo.prompts=''"), runs=tmp_path)
    with pytest.raises(ConfigError, match=r"the model's window holds 8"):
        grpo(make_run("grpo.max_tokens=120"), runs=tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_report_has_curves_and_completions(make_run: Make, tmp_path: Path) -> None:
    run = make_run("train.steps=2")
    grpo(run, runs=tmp_path)
    folder = tmp_path / run.name
    said = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    said[0]["completion"] = "<script>alert(1)</script>"
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    text = write_report(folder).read_text()
    for title in ("Reward", "Solved, held-out prompts", "Ratio to the sampler", "Entropy", "Tokens of a completion"):
        assert title in text
    assert "<h2>Completions</h2>" in text and "&lt;script&gt;" in text and "<script>alert" not in text


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_in_bf16_and_fp8(precision: str, make_run: Make, opened: Callable) -> None:
    """The ratio is 1 after updates too, and a reference read from disk is the reference."""
    feed, trainer = opened(make_run("train.dtype='bfloat16'", f"train.precision='{precision}'", "grpo.beta=0.1"))
    for step in range(2):
        batch = feed.batch(step)
        result = trainer.step(batch, step)
        found = trainer.objective.figures()
        assert found["mismatch"] == 0 and found["ratio_max"] == 1.0 and result.applied and result.grad_norm > 0
        assert (found["kl"] == 0) == (step == 0)
    kept = batch.columns["reference"]
    feed.references = References(feed.run_folder, feed.policy, 2, 0)
    assert torch.equal(feed._reference(batch), kept)


def test_prompts_of_messages_on_the_command_line(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run()
    rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("one", "two", "three")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "held.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "reward.py").write_text(
        "def vowels(prompts, completions, completion_ids, **columns):\n"
        "    assert all(p[-1]['role'] == 'user' and c[0]['role'] == 'assistant' for p, c in zip(prompts, completions))\n"
        "    return [len(c[0]['content']) / 100 for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["grpo", "run.toml", "train.steps=1", "--name", "chat", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.output.splitlines()[-1])
    assert said["step"] == 1 and "reward" in said and "pass_at_1" in said
    row = json.loads((tmp_path / "runs/chat/completions.jsonl").read_text().splitlines()[0])
    assert row["prompt"][0]["role"] == "user"
