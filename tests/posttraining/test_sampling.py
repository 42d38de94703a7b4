"""leanseek sample: accepted answers as rows, the same whatever interrupts it, and an honest pass@k."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leanseek import LLM, SamplingParams
from leanseek.cli import app
from leanseek.data.formats import DataError
from leanseek.errors import InputError
from leanseek.posttraining import sampling
from leanseek.posttraining.prompts import Prompt, read_prompts
from leanseek.posttraining.rewards import RewardConfig
from leanseek.posttraining.sampling import SampleConfig, Sampler, pass_at

EVEN = """
def even(completion_ids, **columns):
    return [1.0 - len(ids) % 2 for ids in completion_ids]

def never(completion_ids, **columns):
    return [None for _ in completion_ids]
"""
PROMPTS = [
    Prompt([{"role": "user", "content": f"{i}+1?"}], f"{i + 1}" if i % 2 else None, {"level": i}) for i in range(6)
]


@pytest.fixture(scope="module")
def llm(chat_model: Callable[..., Path]) -> LLM:
    return LLM(chat_model(), cache_gib=0.01)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rewards") / "even.py"
    file.write_text(EVEN)
    return f"{file}:even"


def render(messages: Any) -> str:
    return "<｜begin▁of▁sentence｜>" + "".join(f"<｜User｜>{m['content']}" for m in messages) + "<｜Assistant｜>"


def sampler(llm: LLM, reward: str, render: Callable[[Any], str] = render, **changes: Any) -> Sampler:
    params = SamplingParams(max_tokens=changes.pop("max_tokens", 40), temperature=changes.pop("temperature", 1.0))
    return Sampler(llm, [RewardConfig(reward)], SampleConfig(**changes), params, render)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("keep", ["shortest", "first", "all"])
def test_rows_are_accepted_whole_answers_and_the_originals_beside_them(
    llm: LLM, even: str, tmp_path: Path, keep: str
) -> None:
    with sampler(llm, even, n=8, keep=keep, system="Think.") as one:
        found = one.run(PROMPTS, tmp_path / "rows.jsonl", "tiny")
        again = [one._asked(prompt) for prompt in PROMPTS]
    params = [SamplingParams(n=8, max_tokens=40, seed=sampling._seed(0, i)) for i in range(len(PROMPTS))]
    expected, right, cut = [], 0, 0
    for prompt, output in zip(PROMPTS, llm.generate([a.ids for a in again], params), strict=True):
        good = [c for c in output.outputs if c.finish_reason == "stop" and len(c.token_ids) % 2 == 0]
        right += len(good)
        cut += sum(c.finish_reason == "length" for c in output.outputs)
        kept = {"shortest": sorted(good, key=lambda c: len(c.token_ids))[:1], "first": good[:1], "all": good}[keep]
        if kept and prompt.original:
            answered = {"role": "assistant", "content": prompt.original}
            expected.append({"messages": [*prompt.prompt, answered]})
        system = {"role": "system", "content": "Think."}
        for choice in {c.text: c for c in kept}.values():
            answered = {"role": "assistant", "content": choice.text}
            expected.append({"messages": [system, *prompt.prompt, answered], "reward": 1.0})
    assert rows_of(tmp_path / "rows.jsonl") == expected and expected
    assert found["pass_at"][1] == pytest.approx(right / 48)
    assert found["cut_off"] == cut > 0 and found["samples"] == 48
    assert list(found["pass_at"]) == [1, 2, 4, 8]
    assert sorted(found["pass_at"].values()) == list(found["pass_at"].values())


def test_text_prompts_give_text_rows(llm: LLM, even: str, tmp_path: Path) -> None:
    with sampler(llm, even) as one:
        one.run([Prompt("1 + 1 =", "2", {})], tmp_path / "rows.jsonl", "tiny")
        rows = rows_of(tmp_path / "rows.jsonl")
        assert rows[0] == {"prompt": "1 + 1 =", "completion": "2"} and set(rows[1]) == {
            "prompt",
            "completion",
            "reward",
        }
    with sampler(llm, even, system="Think.") as one, pytest.raises(InputError, match="--system takes prompts that are"):
        one.run([Prompt("1 + 1 =", None, {})], tmp_path / "other.jsonl", "tiny")


def test_open_r1_349_a_thought_that_the_template_opened_is_whole_in_the_row(
    llm: LLM, even: str, tmp_path: Path
) -> None:
    with sampler(llm, even, lambda messages: render(messages) + "<think>\n", n=16) as one:
        one.run(PROMPTS, tmp_path / "rows.jsonl", "tiny")
    answers = [row["messages"][-1]["content"] for row in rows_of(tmp_path / "rows.jsonl") if "reward" in row]
    assert answers and all(text.startswith("<think>\n") and text.count("<think>\n") == 1 for text in answers)


def test_a_killed_run_goes_on_and_ends_with_the_same_file(
    llm: LLM, even: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with half a line at the end, as kill -9 leaves it."""
    monkeypatch.setattr(sampling, "AT_ONCE", 8)  # two prompts at once
    with sampler(llm, even) as one:
        whole = one.run(PROMPTS, tmp_path / "whole.jsonl", "tiny")

        def stop(done: int, right: int) -> None:
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            one.run(PROMPTS, tmp_path / "rows.jsonl", "tiny", stop)
        partial = tmp_path / ".rows.jsonl.sampled"
        assert not (tmp_path / "rows.jsonl").exists()
        partial.write_bytes(partial.read_bytes() + b"[[], 4, 1")
        seen: list[int] = []
        found = one.run(PROMPTS, tmp_path / "rows.jsonl", "tiny", lambda done, right: seen.append(done))
    assert seen == [4, 6] and not partial.exists()
    assert (tmp_path / "rows.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    timed = {"seconds", "tokens_per_second"}
    assert {k: v for k, v in found.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}


def test_what_was_begun_with_other_settings_is_not_continued(llm: LLM, even: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"

    def stop(done: int, right: int) -> None:
        raise KeyboardInterrupt

    with sampler(llm, even) as one, pytest.raises(KeyboardInterrupt):
        one.run(PROMPTS, out, "tiny", stop)
    for changes, message in (
        ({"seed": 1}, "begun with seed = 0, not 1"),
        ({"temperature": 0.5}, "begun with temperature = 1.0, not 0.5"),
        ({"n": 2}, "begun with n = 4, not 2"),
    ):
        with sampler(llm, even, **changes) as one, pytest.raises(InputError, match=message):
            one.run(PROMPTS, out, "tiny")
    with sampler(llm, even) as one, pytest.raises(InputError, match="begun with model = 'tiny', not 'other'"):
        one.run(PROMPTS, out, "other")
    with sampler(llm, even) as one, pytest.raises(InputError, match="begun with prompts ="):
        one.run(PROMPTS[:5], out, "tiny")
    out.touch()
    with sampler(llm, even) as one, pytest.raises(InputError, match=r"rows.jsonl exists; delete it or"):
        one.run(PROMPTS, out, "tiny")


def test_answers_without_a_reward_are_neither_right_nor_wrong(llm: LLM, even: str, tmp_path: Path) -> None:
    with sampler(llm, even.replace(":even", ":never")) as one:
        found = one.run(PROMPTS, tmp_path / "rows.jsonl", "tiny")
    assert found["abstained"] == found["samples"] and found["pass_at"] == {1: None, 2: None, 4: None}
    assert found["rewards"] == {"never": None} and not rows_of(tmp_path / "rows.jsonl")


def test_settings_that_make_no_sense_are_refused(llm: LLM, even: str) -> None:
    with pytest.raises(InputError, match="--n 4 with temperature 0 samples the same answer 4 times"):
        sampler(llm, even, temperature=0.0)
    with pytest.raises(InputError, match="--keep best is not one of shortest, first, all"):
        SampleConfig(keep="best")


def test_pass_at_k_is_unbiased() -> None:
    """Against every choice of k answers."""
    for n, right, k in ((5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 6)):
        answers = [True] * right + [False] * (n - right)
        chosen = list(itertools.combinations(answers, k))
        assert pass_at(k, [(n, right)]) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    assert pass_at(2, [(4, 4), (4, 0), (1, 1)]) == 0.5 and pass_at(3, [(2, 1)]) is None


def test_prompts_are_read_from_json_lines_and_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    user = {"role": "user", "content": "1+1?"}
    rows = [
        {"prompt": [user], "completion": [{"role": "assistant", "content": "2"}], "answer": 2},
        {"prompt": "1+1=", "answer": 2},
        {"messages": [user, {"role": "assistant", "content": "2"}], "answer": 2},
        {"messages": [user], "answer": 2},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    asked = {"answer": 2}
    expected = [
        Prompt([user], "2", asked),
        Prompt("1+1=", None, asked),
        Prompt([user], "2", asked),
        Prompt([user], None, asked),
    ]
    assert read_prompts(file) == expected
    verl = {"prompt": [user], "data_source": "sums", "reward_model": {"style": "rule", "ground_truth": "2"}}
    pq.write_table(pa.Table.from_pylist([verl]), tmp_path / "rows.parquet")
    columns = {"data_source": "sums", "reward_model": {"style": "rule", "ground_truth": "2"}}
    assert read_prompts(tmp_path / "rows.parquet") == [Prompt([user], None, columns)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}', "rows.jsonl:1 has neither prompt nor messages; it has text"),
        ('{"prompt": "a"}\n{"prompt": 3}', "rows.jsonl:2: prompt must be a text or a list of messages"),
        ('{"prompt": []}', "rows.jsonl:1: prompt must be a text or a list of messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "rows.jsonl:1: messages holds an answer alone"),
        ('{"prompt": "a"', "rows.jsonl:1 is not valid JSON"),
        (
            '{"prompt": "a", "answer": 1}\n{"prompt": "b"}',
            "column 'answer' is in some rows and not in others, such as row 2",
        ),
        ("", "rows.jsonl has no rows"),
    ],
)
def test_prompts_that_are_wrong_are_refused_by_row(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "rows.jsonl")


@pytest.fixture
def asked(chat_model: Callable[..., Path], even: str, tmp_path: Path, small_cache: None) -> Callable[[int], list[str]]:
    """asked(count): the command's arguments for that many prompts."""

    def make(count: int) -> list[str]:
        rows = [{"messages": [{"role": "user", "content": f"{i}"}], "level": i} for i in range(count)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "rewards.toml").write_text(f'[[rewards]]\nfunction = "{even}"\nweight = 2.0\n')
        files = [str(chat_model()), str(tmp_path / "prompts.jsonl"), "--reward", str(tmp_path / "rewards.toml")]
        return ["sample", *files, "--n", "2", "--max-tokens", "16", "--temperature", "1", "--threads", "1"]

    return make


def test_the_command_writes_rows(
    asked: Callable[[int], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = asked(10)
    app([*arguments, "--out", str(tmp_path / "whole.jsonl"), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 10 and found["samples"] == 20 and set(found["pass_at"]) == {"1", "2"}
    app([*arguments, "--out", str(tmp_path / "rows.jsonl")], standalone_mode=False)
    assert "10 prompts, 20 answers" in capsys.readouterr().out
    assert (tmp_path / "rows.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow  # a process; above, a run that was cut in half a line goes on in this one
def test_the_command_survives_kill_9(asked: Callable[[int], list[str]], tmp_path: Path) -> None:
    arguments = asked(160)
    app([*arguments, "--out", str(tmp_path / "whole.jsonl")], standalone_mode=False)
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "leanseek", *arguments, "--out", str(out)]
    killed, partial = subprocess.Popen(command), tmp_path / ".rows.jsonl.sampled"
    while killed.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    if not out.exists():  # else it was quicker than the signal
        app([*arguments, "--out", str(out)], standalone_mode=False)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
