"""What a training step may and may not do. Each balancing test names a mistake that a peer has made."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from pathlib import Path

import pytest
import torch

from leanseek import ModelConfig, Transformer
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.model.moe import Gate, Route
from leanseek.training import RunConfig, Trainer
from leanseek.training.balance import add_counts, update_biases
from leanseek.training.config import BalanceConfig, MTPConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from leanseek.training.objective import losses
from leanseek.training.part import Norms, Part, Slice
from leanseek.training.schedules import batch_size, bias_update_speed, learning_rate, mtp_weight
from tests.small import NETWORK

MODEL = ModelConfig(
    **NETWORK | {"vocab_size": 67, "num_hidden_layers": 3, "n_routed_experts": 8, "initializer_range": 0.1}
)
RUN = RunConfig(
    name="test",
    model=MODEL,
    train=TrainConfig(steps=100, batch_size=4, dtype="float32", device="cpu"),
    optimizer=OptimizerConfig(lr=1e-3),
    schedule=ScheduleConfig(warmup_steps=0),
    balance=BalanceConfig(bias_update_speed=0.01),
)


def batch(rows: int = 4, length: int = 12, seed: int = 0) -> Batch:
    ids = torch.randint(0, 67, (rows, length + 2), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, rows)


def but(**changes: object) -> RunConfig:
    """RUN with keys of its tables changed: but(train={"recompute": True})."""
    return dataclasses.replace(RUN, **{k: dataclasses.replace(getattr(RUN, k), **v) for k, v in changes.items()})


def biases(trainer: Trainer) -> dict[int, torch.Tensor]:
    gates = (m for m in trainer.model.modules() if isinstance(m, Gate))
    return {g.layer: g.e_score_correction_bias.clone() for g in gates}


# ---- balancing ----


def test_bias_moves_once_per_step_over_the_whole_batch_under_accumulation() -> None:
    """torchtitan#1304, #1324: the update ran once per micro-batch."""
    whole, parts = Trainer(RUN), Trainer(but(train={"micro_batch_size": 1}))
    a, b = whole.step(batch(), 0), parts.step(batch(), 0)
    assert all(torch.equal(a.counts[layer], b.counts[layer]) for layer in a.counts)
    for layer, bias in biases(parts).items():
        assert torch.equal(bias, biases(whole)[layer])
        assert all(b in (0.0, pytest.approx(0.01)) for b in bias.abs().tolist())


def test_recomputation_counts_each_token_once() -> None:
    """torchtitan#1593: tokens counted twice under activation checkpointing."""
    result = Trainer(but(train={"recompute": True})).step(batch(), 0)
    assert all(int(c.sum()) == 4 * 12 * 2 for c in result.counts.values())


def test_evaluation_counts_nothing() -> None:
    """torchtitan#4148: validation tokens moved the bias."""
    seen, plain = Trainer(RUN), Trainer(RUN)
    seen.evaluate(batch(seed=9))
    seen.step(batch(), 0)
    plain.step(batch(), 0)
    assert all(torch.equal(b, biases(plain)[layer]) for layer, b in biases(seen).items())


def test_the_mtp_modules_experts_are_balanced_too() -> None:
    """torchtitan#4494: their bias stayed at zero."""
    trainer = Trainer(RUN)
    result = trainer.step(batch(), 0)
    assert 3 in result.counts  # the layer after the last
    assert biases(trainer)[3].abs().max() > 0


def test_a_layer_without_counts_does_not_stop_the_others() -> None:
    """torchtitan#3686."""
    trainer = Trainer(RUN)
    update_biases(trainer.model, {2: torch.tensor([9, 1, 1, 1, 1, 1, 1, 1])}, 0.5)
    assert biases(trainer)[2].tolist() == [-0.5] + [0.5] * 7
    assert biases(trainer)[1].abs().max() == 0


def test_counts_are_exact_integers() -> None:
    """Megatron-LM#7081: in BF16, 40,840 became 41,216 and signs flipped."""
    counts: dict[int, torch.Tensor] = {}
    indices = torch.zeros(40_840, 1, dtype=torch.long)
    add_counts(counts, [Route(0, indices, torch.ones(40_840, 1), torch.zeros(40_840, 2))])
    add_counts(counts, [Route(0, indices[:1] + 1, torch.ones(1, 1), torch.zeros(1, 2))])
    assert counts[0].dtype == torch.int64
    assert counts[0].tolist() == [40_840, 1]


def test_the_update_is_the_papers_sign_step() -> None:
    """b_i += γ·sign(mean - load_i): overloaded down, underloaded up, exactly average unmoved; not centred."""
    gate = Gate(MODEL, 5, None, torch.float32)
    update_biases(gate, {5: torch.tensor([4, 4, 4, 4, 4, 4, 8, 0])}, 0.001)
    assert gate.e_score_correction_bias.tolist() == pytest.approx([0, 0, 0, 0, 0, 0, -0.001, 0.001])


def test_counts_are_summed_over_ranks_before_the_bias_moves() -> None:
    """The global batch decides: a rank that saw another load moves the same bias as the rest."""
    seen: list[torch.Tensor] = []

    class OtherRank(Part):
        def reduce(self, slices: dict[str, Slice], sums: torch.Tensor, counts: torch.Tensor) -> Norms:
            seen.append(counts.clone())
            counts[:, 0] += 1000
            return super().reduce(slices, sums, counts)

    trainer = Trainer(but(train={"micro_batch_size": 1}), part=OtherRank())
    result = trainer.step(batch(), 0)
    assert [(c.dtype, c.shape) for c in seen] == [(torch.int64, (3, 8))]  # once a step; 2 layers and MTP's
    assert all(int(c[0]) >= 1000 for c in result.counts.values())
    assert all(b[0] < 0 and (b[1:] > 0).all() for b in biases(trainer).values())


def test_the_bias_is_float32_in_a_bf16_run() -> None:
    """Megatron-LM#1482."""
    trainer = Trainer(but(train={"dtype": "bfloat16"}))
    trainer.step(batch(), 0)
    assert all(b.dtype == torch.float32 for b in biases(trainer).values())
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())  # master weights


def test_the_sequence_loss_reaches_the_gate() -> None:
    """Megatron-Bridge#5165: silently zero."""
    assert BalanceConfig().sequence_alpha == 1e-4  # on unless a run turns it off
    assert Trainer(RUN).step(batch(), 0).balance_loss > 1e-4
    model = Transformer(MODEL).init_weights(0)
    off, on = losses(model, batch().tokens), losses(model, batch().tokens, sequence_alpha=0.5)
    assert float(off.balance.detach()) == 0
    assert float(on.balance.detach()) > 0.5 * 0.9 * 3  # about α per MoE layer, 2 + 1 of MTP
    on.balance.backward()
    assert model.layers[1].mlp.gate.weight.grad.abs().max() > 0


def test_balancing_by_the_bias_evens_the_load() -> None:
    """The claim of 2.1.2 in small: the same data, with γ and without."""
    violations = {}
    for speed in (0.01, 0.0):
        trainer = Trainer(but(balance={"bias_update_speed": speed, "bias_freeze": 1.0}))
        with torch.no_grad():  # a gate that begins with a favourite
            for layer in (1, 2):
                trainer.model.layers[layer].mlp.gate.e_score_correction_bias[0] = 0.3
        found = [trainer.step(batch(16, 24, seed=i % 4), 10).max_violation for i in range(50)]
        violations[speed] = sum(sum(v.values()) / len(v) for v in found[-10:]) / 10
    assert violations[0.01] < 0.3 * violations[0.0]


# ---- the loss ----


def test_mtp_loss_is_the_mean_over_depths() -> None:
    """Megatron-LM#1532: summed, it exploded. Two modules with the same output have the loss of one."""
    deep = dataclasses.replace(MODEL, num_nextn_predict_layers=2)
    model = Transformer(deep).init_weights(0)
    batch = torch.randint(0, 67, (2, 12 + 3))
    found = losses(model, batch, mtp_weight=0.3)
    hidden, _ = model.hidden(batch[:, :12])
    states, _ = model.predict_ahead(hidden, batch[:, 1:])
    each = [model.head(s, batch[:, 1 + k : 13 + k]) for k, s in enumerate(states, start=1)]
    assert float(found.mtp.detach()) == pytest.approx(float(sum(each).detach()) / 2, rel=1e-6)
    assert float(found.total.detach()) == pytest.approx(float((found.main + 0.3 * found.mtp).detach()), rel=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    """Also where the last micro-batch is smaller, and with the balance loss; recomputation changes nothing either."""
    grads: list[dict[str, torch.Tensor]] = []
    for changes in ({}, {"micro_batch_size": 3}, {"recompute": True}):
        trainer = Trainer(but(train=changes, balance={"sequence_alpha": 0.1}))
        found: dict[str, torch.Tensor] = {}
        for name, parameter in trainer.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, n=name, into=found: into.update({n: p.grad.clone()}))
        trainer.step(batch(), 0)
        grads.append(found)
    for name, whole in grads[0].items():
        assert (grads[1][name] - whole).abs().max() < 1e-5 * whole.abs().max() + 1e-9, name
        assert torch.equal(grads[2][name], whole), name


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_batch_can_be_learned_by_heart(moments: str) -> None:
    trainer = Trainer(but(optimizer={"lr": 1e-2, "moments": moments, "weight_decay": 0.0}))
    first = trainer.step(batch(2, 8), 0).loss
    for step in range(1, 60):
        last = trainer.step(batch(2, 8), min(step, 60)).loss
    assert last < 0.2 * first


def test_bf16_moments_follow_float32_moments() -> None:
    exact, rough = Trainer(RUN), Trainer(but(optimizer={"moments": "bfloat16"}))
    for step in range(5):
        exact.step(batch(seed=step), step)
        rough.step(batch(seed=step), step)
    assert {t.dtype for n, t in rough.state_tensors().items() if n.startswith("exp_avg")} == {torch.bfloat16}
    for (name, a), b in zip(exact.model.named_parameters(), rough.model.parameters(), strict=True):
        assert (a - b).abs().max() < 6e-3, name


def test_decay_spares_norms_and_the_embedding() -> None:
    trainer = Trainer(RUN)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    decayed = {names[id(p)] for p in trainer.optimizer.param_groups[0]["params"]}
    assert "layers.1.mlp.experts.down_proj" in decayed
    assert "lm_head.weight" in decayed
    assert not any("norm" in n or n == "embed_tokens.weight" for n in decayed)


def test_a_nonfinite_gradient_changes_nothing_and_is_named() -> None:
    trainer = Trainer(RUN)
    trainer.step(batch(), 0)
    before = {n: t.clone() for n, t in (trainer.model.state_dict() | trainer.state_tensors()).items()}
    weight = trainer.model.layers[1].self_attn.o_proj.weight
    hook = weight.register_hook(lambda g: g * math.nan)
    result = trainer.step(batch(seed=1), 1)
    hook.remove()
    assert not result.applied
    assert result.culprit == "gradient of layers.1.self_attn.o_proj.weight"
    after = trainer.model.state_dict() | trainer.state_tensors()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert trainer.step(batch(seed=1), 1).applied


def test_the_first_thing_that_is_not_finite_is_named() -> None:
    """A weight before the outputs it spoils, the first module that made one before those it was handed on to."""
    trainer = Trainer(RUN)
    layer = trainer.model.layers[1]
    hook = layer.mlp.experts.register_forward_hook(lambda module, inputs, output: output * math.inf)
    assert trainer.step(batch(), 0).culprit == "output of layers.1.mlp.experts"
    hook.remove()
    with torch.no_grad():
        layer.self_attn.o_proj.weight[0, 0] = math.nan
    assert trainer.step(batch(), 0).culprit == "weight layers.1.self_attn.o_proj.weight"
    assert trainer.nonfinite_weight() == "layers.1.self_attn.o_proj.weight"


def test_ema_is_the_moving_average() -> None:
    trainer = Trainer(but(optimizer={"ema": 0.9}))
    expected = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for step in range(3):
        trainer.step(batch(seed=step), step)
        for n, p in trainer.model.named_parameters():
            expected[n] = 0.9 * expected[n] + 0.1 * p.detach()
    for n, average in trainer.ema.weights.items():
        assert torch.allclose(average, expected[n], atol=1e-6)


# ---- schedules, configuration ----


def test_the_schedule_is_the_papers() -> None:
    run = dataclasses.replace(
        RUN,
        train=TrainConfig(steps=14_800, batch_size=15_360, batch_size_start=3072, ramp=469 / 14_800),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(),
        balance=BalanceConfig(),
        mtp=MTPConfig(),
    )
    at = {t: learning_rate(run, t) for t in (0, 1999, 5000, 9999, 12_150, 14_400, 14_700)}
    assert at[0] == pytest.approx(2.2e-4 / 2000)
    assert at[1999] == at[5000] == at[9999] == 2.2e-4
    assert 2.2e-5 < at[12_150] < 2.2e-4
    assert at[14_400] == 2.2e-5
    assert at[14_700] == 7.3e-6
    assert [batch_size(run, s) for s in (0, 470, 5000)] == [3072, 15_360, 15_360]
    assert [bias_update_speed(run, s) for s in (0, 14_200, 14_500)] == [0.001, 0.001, 0.0]
    assert [mtp_weight(run, s) for s in (0, 9_900, 10_100)] == [0.3, 0.3, 0.1]
    falling = dataclasses.replace(run, balance=BalanceConfig(0.02, bias_update_decay=0.1, bias_freeze=0.5))
    assert [bias_update_speed(falling, s) for s in (0, 3700, 7400)] == [0.02, pytest.approx(0.011), 0.0]


@pytest.mark.parametrize("preset", ["demo", "v2-lite", "v3-671b"])
def test_the_resolved_file_parses_to_the_same_run(preset: str) -> None:
    run = RunConfig.load(preset, ["train.steps=7", "optimizer.moments=bfloat16", "name=other", "optimizer.lr=1"])
    assert (run.train.steps, run.name, run.optimizer.lr) == (7, "other", 1.0)
    assert RunConfig.from_dict(tomllib.loads(run.to_toml())) == run


def test_a_file_may_be_what_differs_from_a_preset(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'preset = "demo"\n[model]\nvocab_size = 777\n[balance]\nbias_update_speed = 0\n'
    )
    run, demo = RunConfig.load(str(tmp_path / "mine.toml"), []), RunConfig.load("demo", [])
    assert run.name == "mine"
    assert run.model == dataclasses.replace(demo.model, vocab_size=777)
    assert run.balance == dataclasses.replace(demo.balance, bias_update_speed=0.0)
    assert (run.train, run.optimizer) == (demo.train, demo.optimizer)


@pytest.mark.parametrize("preset", ["demo", "bench-30m", "bench-3b", "moonlight-16b", "v2-lite", "v3-671b"])
def test_every_preset_is_a_run(preset: str) -> None:
    assert RunConfig.load(preset, []).model == ModelConfig.preset(preset)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", "has no key 'stepz'"),
        ("train.steps=many", "must be int"),
        ("train.steps=0", "at least 1"),
        ("nowhere.x=1", "unknown table"),
        ("model.n_group=3", "multiple of n_group"),
        ("train.steps", "not section.key=value"),
        ("optimizer.moments=fp8", "is not one of auto, float32, bfloat16"),
        ("optimizer.lr=nan", "must be positive"),
        ("optimizer.betas=[0.9]", "two numbers"),
        ("schedule.decay_start=1.5", r"must lie in \[0, 1\]"),
        ("checkpoint.keep_last=0", "at least 1"),
        ("data.seq_len=999999", "beyond model.max_position_embeddings"),
        ("model=3", "unknown table or key"),
        ("preset=nothing", "no preset 'nothing'"),
    ],
)
def test_bad_configuration_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.load("demo", [override])


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_bytes(b"\xff\xfe")
    for name in ("broken.toml", "absent.toml"):
        with pytest.raises(ConfigError, match=name):
            RunConfig.load(str(tmp_path / name), [])


def test_a_device_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"train.device = 'cuda:99'"):
        Trainer(but(train={"device": "cuda:99"}))


@pytest.mark.parametrize("name", [b"l\xe4ufe", "\u7687\u5e1d".encode("gb18030"), "\u7687".encode()])
def test_a_run_whose_name_is_not_utf_8_has_its_figures(tmp_path: Path, name: bytes) -> None:
    """TensorBoard spells a path in UTF-8; in a locale with another encoding every foreign name is like this."""
    from leanseek.training import metrics

    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    for start in (0, 1):
        with metrics.Metrics(folder, 9, start) as seen:
            seen.write({"step": start + 1, "loss": 3.0})
    written = list((folder / "tensorboard").iterdir())
    assert len(written) == 2 and all(b"loss" in file.read_bytes() for file in written)
    assert [row["step"] for row in metrics.read_rows(folder / "metrics.jsonl")] == [1, 2]


def test_without_a_terminal_a_line_comes_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leanseek.training import metrics

    monkeypatch.setattr(metrics, "_SAY_EVERY", -1)
    said: list[str] = []
    with metrics.Metrics(tmp_path, 9, 0) as seen:
        monkeypatch.setattr(seen, "say", said.append)
        seen.show(1, "loss 3")
        monkeypatch.setattr(metrics, "_SAY_EVERY", 3600)
        seen.show(2, "loss 2")
    assert said == ["step 1: loss 3"]
