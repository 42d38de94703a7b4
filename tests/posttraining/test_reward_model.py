"""Reward models learn pairs, whatever is packed, padded or resumed, and serve as rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import leanseek
from leanseek import Transformer
from leanseek.cli import app
from leanseek.config import ConfigError
from leanseek.data.batch import Batch
from leanseek.data.formats import DataError
from leanseek.errors import InputError
from leanseek.posttraining.reward_model import Pairwise, RewardModel, packed, score_samples, scores
from leanseek.posttraining.reward_run import RewardRun, train_reward
from leanseek.posttraining.rewards import Reward, RewardConfig

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def model(tiny_model: Callable[..., Transformer]) -> Transformer:
    return tiny_model(num_labels=1)


def samples(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in lengths]


def loss_of(model: Transformer, pairs: list[list[list[int]]], micro: int) -> tuple[float, dict[str, torch.Tensor]]:
    tokens, lengths = packed(pairs, 1)
    objective, total = Pairwise(torch.float32), 0.0
    model.zero_grad()
    for batch in Batch(tokens, len(pairs), lengths).split(micro):
        found = objective(model, batch, 0)
        found.backward()
        total += float(found.main.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_trl_2778_a_score_does_not_depend_on_padding(model: Transformer) -> None:
    """Nor on what is scored with it: to the bit."""
    some = samples([5, 17, 1, 9])
    alone = [score_samples(model, [ids])[0] for ids in some]
    assert score_samples(model, some) == alone and len(set(alone)) == 4
    assert score_samples(model, [*some, *samples([40], 1)])[:4] == alone
    with torch.no_grad():
        for more in (0, 1, 30):
            tokens, lengths = packed([[ids] for ids in some], more)
            tokens[tokens == 0] = 7  # whatever the padding is
            tokens[0, :5] = torch.tensor(some[0])
            found, _ = scores(model, packed([[ids] for ids in some], more)[0], lengths)
            torch.testing.assert_close(found, torch.tensor(alone), rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_formula_on_unpacked_answers(model: Transformer) -> None:
    flat = samples([6, 9, 4, 4, 12, 3])
    pairs = [flat[0:2], flat[2:4], flat[4:6]]
    loss, gradients = loss_of(model, pairs, 0)
    each = [model(torch.tensor([ids]))[0, -1, 0] for ids in flat]
    model.zero_grad()
    wanted = -torch.stack([torch.nn.functional.logsigmoid(each[i] - each[i + 1]) for i in (0, 2, 4)]).mean()
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=2e-3, atol=2e-5)


def test_any_split_into_micro_batches_gives_the_same_gradient(model: Transformer) -> None:
    flat = samples([6, 9, 4, 4, 12, 3, 2, 15])
    pairs = [flat[i : i + 2] for i in range(0, 8, 2)]
    loss, gradients = loss_of(model, pairs, 0)
    for micro in (1, 3):
        again, others = loss_of(model, pairs, micro)
        assert again == pytest.approx(loss, rel=1e-5)
        for name in gradients:
            torch.testing.assert_close(others[name], gradients[name], rtol=2e-3, atol=2e-5)


# ---- a run ----

CONFIG = """
from = "{base}"
[data]
path = "{folder}/pairs.jsonl"
seq_len = 64
[reward]
held_out = "{folder}/held.jsonl"
[train]
batch_size = 8
dtype = "float32"
eval_every = 100
[optimizer]
lr = 5e-3
[checkpoint]
every = 5
"""


@pytest.fixture(scope="module")
def place(chat_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in which the chosen answer has an "a" and the rejected one a "b", both of the same length."""
    folder = tmp_path_factory.mktemp("pairs")
    base = chat_model()
    generator = torch.Generator().manual_seed(0)
    for name, count in (("pairs", 160), ("held", 40)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                size = int(torch.randint(1, 12, (), generator=generator))
                prompt = [{"role": "user", "content": "x" * int(torch.randint(1, 9, (), generator=generator))}]
                chosen, rejected = ([{"role": "assistant", "content": "." * size + c}] for c in "ab")
                file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    (folder / "rm.toml").write_text(CONFIG.format(base=base, folder=folder))
    return folder


@pytest.fixture(scope="module")
def trained(place: Path, quick_runs: None) -> Path:
    torch.set_num_threads(1)
    return train_reward(RewardRun.load(str(place / "rm.toml"), []), runs=place / "runs").folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_one_epoch_and_learns_which_answers_are_chosen(trained: Path) -> None:
    rows = rows_of(trained)
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 20 and steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert steps[0]["batch_size"] == 8 and steps[-1]["accuracy"] > 0.9 and steps[-1]["margin"] > 0
    last = next(row for row in reversed(rows) if "val_accuracy" in row)
    assert last["val_accuracy"] > 0.9 and last["val_loss"] < 0.4


def test_it_serves_as_a_reward_and_as_no_language_model(trained: Path) -> None:
    prompts: list[Any] = [[{"role": "user", "content": "xxx"}]] * 3
    with Reward(RewardConfig("model", seconds=120, arguments={"path": str(trained)})) as reward:
        found = reward.score(prompts, ["..a", "..b", "..a"], [[1]] * 3, unused=[1, 2, 3])
    assert found[0] == found[2] > found[1]  # type: ignore[operator]
    assert found == RewardModel(trained).score(prompts, ["..a", "..b", "..a"])
    with pytest.raises(InputError, match="is a reward model"):
        leanseek.LLM(trained)


def test_a_language_model_is_no_reward_model(chat_model: Callable[..., Path]) -> None:
    folder = chat_model()
    with pytest.raises(InputError, match=r"is no reward model: it has no score.weight"):
        RewardModel(folder)
    with pytest.raises(InputError, match=r"the reward model: .*is no reward model"):
        Reward(RewardConfig("model", arguments={"path": str(folder)}))
    with pytest.raises(InputError, match=r"the reward model: .*needs path"):
        Reward(RewardConfig("model"))


def test_a_resumed_run_repeats_the_uninterrupted_one(place: Path, trained: Path) -> None:
    run = RewardRun.load(str(place / "rm.toml"), ["name=again"])

    class Stop(Exception):
        pass

    def prepare(model: Transformer) -> None:
        count = 0

        def after(*_: object) -> None:
            nonlocal count
            count += 1
            if count == 13:
                raise Stop

        model.layers[0].register_forward_pre_hook(after)

    with pytest.raises(Stop):
        train_reward(run, runs=place / "runs", prepare=prepare)
    train_reward(run, runs=place / "runs", resume=True)
    whole, again = (leanseek.load(folder).state_dict() for folder in (trained, place / "runs" / "again"))
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    with pytest.raises(ConfigError, match=r"train.seed = 1, but the run continues with 0"):
        train_reward(
            RewardRun.load(str(place / "rm.toml"), ["name=again", "train.seed=1"]), runs=place / "runs", resume=True
        )


def test_the_command_trains(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    app(["reward", "rm.toml", "reward.epochs=0.1", "--name", "short", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2 and found["folder"] == "runs/short"
    again = RewardRun.load(str(place / "runs/short/config.toml"), [])
    assert again.model.num_labels == 1 and again.model.num_nextn_predict_layers == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"pairs.jsonl:1: a pair has prompt, chosen and rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"pairs.jsonl:1: chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b" * 99, "rejected": "b"}, r"pairs.jsonl:1 has an answer of 10\d tokens"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, r"pairs.jsonl:1: prompt is a text, so completion must be one"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(place: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    run = RewardRun.load(str(place / "rm.toml"), [f"data.path={tmp_path / 'pairs.jsonl'}"])
    with pytest.raises(DataError, match=message):
        train_reward(run, runs=tmp_path)


def test_settings_that_make_no_sense_are_refused(place: Path) -> None:
    (place / "none.toml").write_text((place / "rm.toml").read_text().replace('path = "', '# "'))
    with pytest.raises(ConfigError, match=r"set data.path to the pairs"):
        RewardRun.load(str(place / "none.toml"), [])
    with pytest.raises(ConfigError, match=r"reward.epochs = -1.0 must lie"):
        RewardRun.load(str(place / "rm.toml"), ["reward.epochs=-1"])
