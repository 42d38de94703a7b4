"""Rewards: any function a user has, in its own process, within its time; and the built-in ones, which are hard to please."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leanseek.errors import InputError, RunError
from leanseek.posttraining import graders
from leanseek.posttraining.rewards import Reward, RewardConfig, Rewards, read_rewards, reward_tables

PROMPTS = ["1+1=", "2+2=", "3+3="]
TEXTS = ["2", "5", "6"]
IDS = [[1], [2, 3], [4, 5, 6]]

FUNCTIONS = """
import asyncio, os, sys, time
from neighbour import LIMIT


def by_length(prompts, completions, completion_ids, **kwargs):
    print("this is not an answer")
    return [len(ids) / LIMIT for ids in completion_ids]


def seen(prompts, completions, completion_ids, **columns):
    import json
    with open(columns["out"][0], "w") as file:
        json.dump([prompts, completions, completion_ids, sorted(columns)], file)
    return [0] * len(prompts)


async def waits(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def abstains(completions):
    return [None if text == "5" else 1.0 for text in completions]


def needs_level(completions, level):
    return level


def scaled(completions, factor, offset=0):
    return [factor * len(text) + offset for text in completions]


class Graded:
    def __call__(self, completions):
        return [1] * len(completions)


graded = Graded()


def hangs(completions, **kwargs):
    if "5" in completions:
        time.sleep(600)
    return [1.0] * len(completions)


def busy(completions):
    while "5" in completions:
        pass
    return [1.0] * len(completions)


def evaluates(completions):
    return [eval(text) for text in completions]  # what graders must not do; a user's may


def dies(completions):
    if "5" in completions:
        os._exit(3)
    return [1.0] * len(completions)


def always_hangs(completions):
    time.sleep(600)


def raises(completions):
    raise KeyError("gold")


def too_few(completions):
    return [1.0]


def words(completions):
    return ["good"] * len(completions)


def nothing(completions):
    return None


def infinite(completions):
    return [float("inf")] * len(completions)


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and isinstance(solution_str, str)
    return {"score": float(solution_str == ground_truth), "acc": True}


async def compute_score_async(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(solution_str == ground_truth) + extra_info["bonus"]


number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "neighbour.py").write_text("LIMIT = 4\n")
    (folder / "mine.py").write_text(FUNCTIONS)
    return folder / "mine.py"


@pytest.fixture
def reward(file: Path) -> Iterator[Callable[..., Reward]]:
    """reward(name, **settings): the function of that name."""
    opened: list[Reward] = []

    def make(name: str, /, **settings: Any) -> Reward:
        opened.append(Reward(RewardConfig(f"{file}:{name}", **settings)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_a_function_as_for_trl_from_a_file_with_neighbours(reward: Callable[..., Reward]) -> None:
    assert reward("by_length").score(PROMPTS, TEXTS, IDS, answer=TEXTS) == [0.25, 0.5, 0.75]


def test_a_function_gets_what_trl_gives_it(reward: Callable[..., Reward], tmp_path: Path) -> None:
    """Everything by keyword, as lists; after messages a completion is a list of one message."""
    out = tmp_path / "seen.json"
    one = reward("seen")
    one.score(PROMPTS[:1], TEXTS[:1], IDS[:1], out=[str(out)], level=[3])
    assert json.loads(out.read_text()) == [["1+1="], ["2"], [[1]], ["level", "out"]]
    messages = [{"role": "user", "content": "1+1="}]
    one.score([messages], TEXTS[:1], IDS[:1], out=[str(out)])
    assert json.loads(out.read_text())[:2] == [[messages], [[{"role": "assistant", "content": "2"}]]]


@pytest.mark.parametrize(
    ("name", "scores"), [("waits", [1.0, 1.0, 1.0]), ("abstains", [1.0, None, 1.0]), ("graded", [1.0, 1.0, 1.0])]
)
def test_async_functions_callable_objects_and_those_that_abstain(
    reward: Callable[..., Reward], name: str, scores: list[float | None]
) -> None:
    assert reward(name).score(PROMPTS, TEXTS, IDS, unused=TEXTS) == scores


def test_arguments_are_passed_to_every_call(reward: Callable[..., Reward]) -> None:
    assert reward("scaled", arguments={"factor": 2}).score(PROMPTS, TEXTS, IDS) == [2.0, 2.0, 2.0]
    with pytest.raises(InputError, match=r"takes no argument 'facter'; it takes completions, factor, offset"):
        reward("scaled", arguments={"facter": 2})


def test_a_column_that_is_not_there_is_named(reward: Callable[..., Reward]) -> None:
    with pytest.raises(InputError, match=r"needs_level needs a column 'level'; the rows have answer, lvl"):
        reward("needs_level").check({"answer", "lvl"})
    with pytest.raises(InputError, match="a column 'completions', a name that rewards use"):
        reward("graded").check({"completions"})


def test_verls_compute_score_is_recognised_by_its_signature(reward: Callable[..., Reward]) -> None:
    columns: dict[str, Any] = {
        "data_source": ["sums"] * 3,
        "reward_model": [{"style": "rule", "ground_truth": truth} for truth in ("2", "4", "6")],
        "extra_info": [{"bonus": 0.5}] * 3,
    }
    assert reward("compute_score").score(PROMPTS, TEXTS, IDS, **columns) == [1.0, 0.0, 1.0]
    assert reward("compute_score_async").score(PROMPTS, TEXTS, IDS, **columns) == [1.5, 0.5, 1.5]
    messages = [[{"role": "user", "content": p}] for p in PROMPTS]
    assert reward("compute_score").score(messages, TEXTS, IDS, **columns) == [1.0, 0.0, 1.0]
    with pytest.raises(InputError, match=r"compute_score: it needs a column reward_model.ground_truth or ground_truth"):
        reward("compute_score").score(PROMPTS, TEXTS, IDS, data_source=["sums"] * 3)
    with pytest.raises(InputError, match="needs a column 'data_source'"):
        reward("compute_score").check(["ground_truth"])


def test_a_function_of_an_installed_module() -> None:
    with Reward(RewardConfig("leanseek.posttraining.graders:format")) as one:
        assert one.name == "format" and one.score(["a"], ["<think>b</think>c"], [[1]]) == [1.0]


@pytest.mark.parametrize("name", ["hangs", "busy"])
def test_math_verify_50_a_hung_grader_ends_in_time_and_is_named(
    reward: Callable[..., Reward], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    one = reward(name, name="slow judge", seconds=1.5)
    with caplog.at_level(logging.WARNING):
        assert one.score(PROMPTS, TEXTS, IDS) == [1.0, None, 1.0]
    said = caplog.text
    assert "the reward slow judge took more than 1.5 s with 3 completions; now each alone" in said
    assert "the reward slow judge took more than 1.5 s at a completion, which abstains: 5" in said
    assert one.score(PROMPTS[:1], TEXTS[:1], IDS[:1]) == [1.0]  # and goes on


def test_a_users_eval_of_a_tower_of_powers_ends_in_time(reward: Callable[..., Reward]) -> None:
    assert reward("evaluates", seconds=1.5).score(PROMPTS, ["2", "9**9**9**9", "6"], IDS) == [2.0, None, 6.0]


def test_a_grader_that_ends_its_process_is_named(
    reward: Callable[..., Reward], caplog: pytest.LogCaptureFixture
) -> None:
    assert reward("dies").score(PROMPTS, TEXTS, IDS) == [1.0, None, 1.0]
    assert "the reward dies ended its own process at a completion, which abstains: 5" in caplog.text


def test_a_grader_that_always_hangs_ends_the_run(reward: Callable[..., Reward]) -> None:
    with pytest.raises(RunError, match=r"always_hangs took more than 0.2 s at each of 3 completions, the first: 2"):
        reward("always_hangs", seconds=0.2).score(PROMPTS * 4, TEXTS * 4, IDS * 4)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("raises", RunError, r"the reward raises: KeyError: 'gold' \(mine.py:\d+\)"),
        ("too_few", InputError, "the reward too_few: it returned 1 scores for 3 completions"),
        ("words", InputError, "the reward words: it returned 'good', not a number or None"),
        ("nothing", InputError, "the reward nothing: it returned NoneType, not a list of 3 numbers"),
        ("infinite", InputError, "the reward infinite: it returned inf; a reward that does not apply returns None"),
    ],
)
def test_what_a_function_does_wrong_is_one_line(
    reward: Callable[..., Reward], name: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        reward(name).score(PROMPTS, TEXTS, IDS)


def test_a_column_that_json_cannot_hold_is_refused(reward: Callable[..., Reward]) -> None:
    with pytest.raises(InputError, match="the reward waits: a column holds what JSON cannot"):
        reward("waits").score(PROMPTS, TEXTS, IDS, image=[b"1", b"2", b"3"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("accuracy", "no built-in reward 'accuracy'; there are answer, format, length, code"),
        ("nowhere.py:f", "nowhere.py is not a file"),
        ("no_such_package.rewards:f", "no module 'no_such_package' is installed here"),
        ("json:nothing_there", "json:nothing_there: 'nothing_there' is nothing that can be called"),
        ("{file}:number", "'number' is nothing that can be called"),
        ("{file}:Graded", "'Graded' is a class; name an instance of it"),
        ("{folder}/broken.py:f", "broken: ZeroDivisionError: division by zero (broken.py:2)"),
        ("{folder}/needs.py:f", "ModuleNotFoundError: No module named 'not_installed'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused(file: Path, function: str, message: str) -> None:
    (file.parent / "broken.py").write_text("# first\n1 / 0\n")
    (file.parent / "needs.py").write_text("import not_installed\n")
    with pytest.raises(InputError) as found:
        Reward(RewardConfig(function.format(file=file, folder=file.parent), name="broken"))
    assert message in str(found.value) and "\n" not in str(found.value)


def test_processes_end_with_the_reward_and_with_their_parent(file: Path) -> None:
    """Also when the parent is killed while a grader hangs."""
    one = Reward(RewardConfig(f"{file}:hangs"))
    (child,) = one._children
    one.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
    program = (
        "from leanseek.posttraining.rewards import Reward, RewardConfig\n"
        f"one = Reward(RewardConfig({f'{file}:hangs'!r}, seconds=1))\n"
        "print(next(iter(one._children)).pid, flush=True)\n"
        "one.score(['a'], ['5'], [[1]])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        for _ in range(200):
            os.kill(pid, 0)
            time.sleep(0.1)
        pytest.fail("the grader's process is still there")
    except ProcessLookupError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_several_rewards_are_weighted_and_those_that_abstain_do_not_count(file: Path) -> None:
    settings = [
        RewardConfig(f"{file}:abstains", weight=2.0),
        RewardConfig(f"{file}:scaled", weight=-0.5, arguments={"factor": 1}),
    ]
    with Rewards(settings) as both:
        found = both.score(PROMPTS, TEXTS, IDS)
    assert found.by_name == {"abstains": [1.0, None, 1.0], "scaled": [1.0, 1.0, 1.0]}
    assert found.total == [1.5, -0.5, 1.5]
    with Rewards(settings[:1]) as one:
        assert one.score(PROMPTS, TEXTS, IDS).total == [2.0, None, 2.0]
        assert one.score([], [], []).total == []
    with pytest.raises(InputError, match="there is no reward"):
        Rewards([])


def test_the_tables_of_a_configuration_are_read_and_written(tmp_path: Path) -> None:
    tables = [{"function": "answer", "weight": 1}, {"function": "length", "arguments": {"limit": 64, "buffer": 16}}]
    found = read_rewards(tables)
    assert [one.name for one in found] == ["answer", "length"] and found[0].seconds == 30.0
    assert read_rewards(reward_tables(found)) == found


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"function": "answer"}, r"rewards must be an array of tables: \[\[rewards\]\]"),
        ([{"function": "answer", "wieght": 2.0}], "has no key 'wieght'; there are function, name, weight"),
        ([{"function": "answer", "weight": "2"}], "rewards.weight must be float, not '2'"),
        ([{"function": "answer", "weight": float("nan")}], "weight = nan must be a finite number"),
        ([{"function": "answer", "seconds": 0}], "seconds = 0 must be positive"),
        ([{"weight": 2.0}], "needs function ="),
        ([{"function": "answer"}, {"function": "a.py:answer"}], "two rewards are called 'answer'"),
    ],
)
def test_tables_that_are_wrong_are_refused(tables: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_rewards(tables)


# ---- the built-in rewards ----


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("42", "42"),
        (" The answer is 42. ", "42"),
        ("Answer: **7**", "7"),
        ("<think>1 or 2</think>42", "42"),
        ("I carry one.</think>\n42", "42"),  # the template had written <think>
        ("<think>2</think><answer> 42 </answer>", "42"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("12 + 30\n#### 42\nDone", "42"),
        (r"$42$", "42"),
    ],
)
def test_the_one_answer_of_a_text_is_found(text: str, found: str) -> None:
    assert graders.final_answer(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "<answer>A</answer><answer>B</answer><answer>C</answer>",
        "<think>x</think><answer>A</answer> <answer>A</answer>",
        "<answer>A or B or C</answer>",
        "A or B or C",
        "<think>x</think><think>y</think>A",
        "<think>x</think></think>A",
        "</think><think>A",
        "<think>A",
        "<answer>A",
        "A</answer>",
        r"\boxed{A} or \boxed{B}",
        r"\boxed{A",
        "#### A\n#### B",
        "The answer is A or the answer is B",
        "",
    ],
)
def test_open_r1_359_repeated_tags_and_a_or_b_or_c_score_0(text: str) -> None:
    assert graders.answer([text], answer=["A"]) == [0.0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234", "1234"),
        ("$1,234.50", "1234.5"),
        ("+7", "7"),
        ("-.5", "-1/2"),
        ("\u22125", "-5"),
        (r"\frac{3}{4}", "0.75"),
        (r"-\dfrac{3}{4}", "-0.75"),
        (r"\frac{-3}{4}", "-0.75"),
        ("1e3", "1000"),
        ("50%", r"50\%"),
        ("007", "7"),
        ("1e999999999", "1e999999999"),
        ("Paris", " paris"),
        ("(1, 2)", "(1,2)"),
    ],
)
def test_answers_that_are_equal(one: str, other: str) -> None:
    assert graders.same(one, other) and graders.same(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1.234", "1234"), ("12,34", "1234"), ("0.333", "1/3"), ("1/0", "0"), ("12 apples", "12"), ("7", "7.0000001")],
)
def test_answers_that_are_not(one: str, other: str) -> None:
    assert not graders.same(one, other) and not graders.same(other, one)


@pytest.mark.parametrize(
    "text", ["9**9**9**9", "1e999999999", "9" * 100_000, "1/" + "9" * 100_000, "(" * 100_000, "\\boxed{" * 20_000]
)
def test_no_eval_in_graders(text: str) -> None:
    """9**9**9**9 and its like return at once: within a limit that the process would be ended at."""
    with Reward(RewardConfig("answer", seconds=60)) as one:
        assert one.score(["a"], [text], [[1]], answer=["3"]) == [0.0]


def test_truths_come_from_any_of_the_usual_columns() -> None:
    assert graders.answer(["4", "5"], answer=[4, ["five", 5.0]]) == [1.0, 1.0]
    assert graders.answer(["4"], ground_truth=["4"]) == [1.0]
    assert graders.answer(["4"], reward_model=[{"ground_truth": "4"}]) == [1.0]
    assert graders.answer([[{"role": "assistant", "content": "4"}]], answer=["4"]) == [1.0]
    with Reward(RewardConfig("answer")) as one, pytest.raises(InputError, match="needs a column answer, ground_truth"):
        one.score(["a"], ["4"], [[1]])


@pytest.mark.parametrize(
    ("text", "opened", "score"),
    [
        ("<think>one</think>two", False, 1),
        (" <think>\none</think>\ntwo", False, 1),
        ("one</think>two", True, 1),
        ("one</think>two", False, 0),
        ("<think>one</think>two", True, 0),
        ("<think></think>two", False, 0),
        ("<think>one</think> ", False, 0),
        ("<think>one", False, 0),
        ("first <think>one</think>two", False, 0),
        ("<think>one</think>two<think>three</think>four", False, 0),
        ("one</think>two<think>", False, 0),
        ("two", False, 0),
    ],
)
def test_the_format_is_one_thought_then_an_answer(text: str, opened: bool, score: int) -> None:
    assert graders.format([text], opened) == [score]


def test_length_is_a_soft_limit() -> None:
    ids = [[0] * n for n in (1, 48, 56, 64, 100)]
    assert graders.length(ids, limit=64, buffer=16) == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(InputError, match="0 < buffer <= limit"):
        graders.length(ids, limit=8, buffer=16)


def test_code_is_judged_by_its_tests() -> None:
    right = "Here:\n```python\ndef double(x):\n    return 2 * x\n```"
    texts = [
        f"<think>```python\n1/0\n```</think>{right}",
        right.replace("2", "3"),
        "def double(x): return x + x",
        "```",
    ]
    with Reward(RewardConfig("code")) as one:
        tests: list[Any] = [["assert double(2) == 4", "assert double(5) == 10"]] * 2 + ["assert double(2) == 4"] * 2
        assert one.score(["p"] * 4, texts, [[1]] * 4, tests=tests) == [1.0, 0.0, 1.0, 0.0]
        with pytest.raises(InputError, match="needs tests in each row"):
            one.score(["p"], texts[:1], [[1]], tests=[""])
    assert graders.code(["while True: pass"], ["assert True"], seconds=1) == [0.0]


def test_reasoning_gym_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"pip install 'leanseek\[reasoning\]'"):
        graders.reasoning_gym(["4"], ["4"], [{"source_dataset": "chain_sum"}])
