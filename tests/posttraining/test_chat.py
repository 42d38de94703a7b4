"""Rows of chats become what the model is prompted with, and what it learns to answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from leanseek.data.formats import DataError
from leanseek.posttraining.chat import Chats, Sample
from leanseek.posttraining.rows import read_rows
from leanseek.posttraining.shards import prepare_chats

THINKING = ("<think>", "</think>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")
ASK, TELL = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}
Make = Callable[..., Chats]


@pytest.fixture(scope="module")
def chats(chat_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """chats(*added tokens, template=None): of a tokenizer with these tokens."""

    def make(*added: str, template: str | None = None) -> Chats:
        return Chats(chat_tokenizer(*added, template=template))

    return make


def texts(chats: Chats, sample: Sample) -> tuple[str, str]:
    """What is prompted and what is learned, of a sample with one answer at its end."""
    start = sample.learned.index(True)
    assert all(sample.learned[start:])
    return chats.tokenizer.decode(sample.ids[:start], False), chats.tokenizer.decode(sample.ids[start:], False)


BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def test_only_answers_are_learned_with_their_end_token(chats: Make) -> None:
    """Two turns that go on from each other are one sample; pad = eos does not hide the end token (trl#1623)."""
    own = chats(*DEEPSEEK)
    system = {"role": "system", "content": "Be brief."}
    (sample,) = own.samples({"messages": [system, ASK, TELL, ASK, TELL]}, "here")
    text = f"{BOS}Be brief.<｜User｜>What is 2+2?<｜Assistant｜>It is 4.{EOS}"
    assert own.tokenizer.decode(sample.ids, False) == f"{text}<｜User｜>What is 2+2?<｜Assistant｜>It is 4.{EOS}"
    learned = own.tokenizer.decode([i for i, on in zip(sample.ids, sample.learned, strict=True) if on], False)
    assert learned == f"It is 4.{EOS}" * 2


def test_one_bos_openrlhf_393(chats: Make) -> None:
    for added in ((), DEEPSEEK, (*DEEPSEEK, *THINKING)):
        own = chats(*added)
        for row in (
            {"messages": [ASK, TELL]},
            {"prompt": f"{BOS}2+2", "completion": "=4"},
            {"prompt": "2", "completion": ""},
        ):
            for sample in own.samples(row, "here"):
                assert sample.ids.count(own.special.bos) == (
                    1 if "messages" in row or own.special.leading else BOS in row["prompt"]
                )


THOUGHT = "<think>\ntwo and two\n</think>\n\nIt is 4."


@pytest.mark.parametrize("messages", [
    [ASK, TELL | {"content": THOUGHT}],
    [ASK, TELL | {"reasoning_content": "two and two"}],
])  # fmt: skip
def test_the_template_neither_hides_nor_doubles_think_open_r1_349(chats: Make, messages: list) -> None:
    """R1's own leaves the thoughts of answers out, and opens them in the prompt."""
    for template in (None, R1):
        own = chats(*DEEPSEEK, *THINKING, template=template)
        (sample,) = own.samples({"messages": messages}, "here")
        prompt, answer = texts(own, sample)
        assert prompt == f"{BOS}<｜User｜>What is 2+2?<｜Assistant｜><think>\n"
        assert answer == f"two and two\n</think>\n\nIt is 4.{EOS}"


R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def test_an_answer_without_thoughts_ends_them_at_once(chats: Make) -> None:
    for template in (None, R1):
        own = chats(*DEEPSEEK, *THINKING, template=template)
        prompt, answer = texts(own, own.samples({"messages": [ASK, TELL]}, "here")[0])
        assert prompt.endswith("<think>\n") and answer == f"\n</think>\n\nIt is 4.{EOS}"


def test_v31_says_in_the_prompt_whether_there_are_thoughts(chats: Make) -> None:
    own = chats(*DEEPSEEK, *THINKING, "<｜search▁begin｜>")
    prompt, answer = texts(own, own.samples({"messages": [ASK, TELL]}, "here")[0])
    assert prompt.endswith("<｜Assistant｜></think>") and answer == f"It is 4.{EOS}"
    prompt, answer = texts(own, own.samples({"messages": [ASK, TELL | {"content": THOUGHT}]}, "here")[0])
    assert prompt.endswith("<｜Assistant｜><think>") and answer == f"{THOUGHT.removeprefix('<think>')}{EOS}"


def test_thoughts_of_earlier_turns_are_not_in_later_prompts(chats: Make) -> None:
    """So each answer is a sample of its own, after the prompt that a server would send."""
    own = chats(*DEEPSEEK, *THINKING)
    first, second = own.samples({"messages": [ASK, TELL | {"content": THOUGHT}] * 2}, "here")
    assert texts(own, first)[1] == texts(own, second)[1] == f"two and two\n</think>\n\nIt is 4.{EOS}"
    assert "two and two" not in texts(own, second)[0] and "It is 4." in texts(own, second)[0]


def test_a_base_models_script(chats: Make) -> None:
    own = chats()
    (sample,) = own.samples({"messages": [ASK, TELL]}, "here")
    assert texts(own, sample) == (f"{BOS}User: What is 2+2?\n\nAssistant:", f" It is 4.{EOS}")


def test_prompt_and_completion(chats: Make) -> None:
    """Messages: earlier answers of the prompt are not learned. Texts go as they are."""
    own = chats(*DEEPSEEK)
    (sample,) = own.samples({"prompt": [ASK, TELL, ASK], "completion": [TELL]}, "here")
    assert texts(own, sample)[1] == f"It is 4.{EOS}"
    (sample,) = own.samples({"prompt": "2+2=", "completion": "4"}, "here")
    assert texts(own, sample) == ("2+2=", f"4{EOS}")


@pytest.mark.parametrize(("row", "line"), [
    ({"messages": [ASK]}, "no turn of an assistant"),  # trl#6668
    ({"messages": []}, "not empty"),
    ({"messages": [{"content": "x"}]}, "must have a role"),
    ({"messages": [ASK, {"role": "assistant", "content": None}]}, "role assistant has no text"),
    ({"prompt": "x"}, "neither messages nor prompt and completion"),
    ({"text": "x"}, "it has text"),
    ({"prompt": "x", "completion": [TELL]}, "completion must be one"),
])  # fmt: skip
def test_a_row_that_teaches_nothing_is_named_trl_6668(chats: Make, row: dict, line: str) -> None:
    with pytest.raises(DataError, match=rf"^rows.jsonl:7: .*{line}"):
        chats(*DEEPSEEK).samples(row, "rows.jsonl:7")


def test_an_end_that_ends_nothing_is_refused(chats: Make) -> None:
    """The server would not stop there."""
    template = "{% for m in messages %}{{ m.role + m.content + '<｜User｜>' }}{% endfor %}"
    with pytest.raises(DataError, match="ends an answer with <｜User｜>, which ends no text"):
        chats(*DEEPSEEK, template=template)


def test_rows_of_every_kind(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [ASK, TELL]}, {"messages": [ASK, TELL, ASK, TELL]}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.jsonl")) == [
        (rows[0], f"{tmp_path}/a.jsonl:1"),
        (rows[1], f"{tmp_path}/a.jsonl:3"),
    ]
    assert [row for row, _ in read_rows(tmp_path / "a.parquet")] == rows
    (tmp_path / "b.jsonl").write_text("[1]")
    for name, line in (
        ("b.jsonl", "b.jsonl:1 must hold a JSON object"),
        ("b.txt", "is not one of"),
        ("c.jsonl", "does not exist"),
    ):
        with pytest.raises(DataError, match=line):
            list(read_rows(tmp_path / name))


def test_prepared_chats_are_resumed_and_serve_their_template(
    chat_tokenizer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed preparation goes on after its last shard and ends with the same bytes."""
    tokenizer = chat_tokenizer(*DEEPSEEK, *THINKING)
    rows = [{"messages": [ASK, TELL | {"content": f"{i} " * 9}]} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def go(out: str) -> None:
        prepare_chats([tmp_path / "rows.jsonl"], tmp_path / out, tokenizer, validation_fraction=0.2, shard_tokens=300)

    go("whole")
    calls, samples = [0], Chats.samples

    def dies(self: Chats, row: dict, place: str) -> list[Sample]:
        calls[0] += 1
        if calls[0] == 20:
            raise OSError("killed")
        return samples(self, row, place)

    with monkeypatch.context() as patch:
        patch.setattr(Chats, "samples", dies)
        with pytest.raises(Exception, match="killed"):
            go("parts")
    done = len(list((tmp_path / "parts").glob("0*.json")))
    assert done > 1 and not (tmp_path / "parts/manifest.json").exists()
    go("parts")
    names = sorted(p.name for p in (tmp_path / "whole").iterdir() if not p.name.startswith("."))
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    assert "chat_template.jinja" in names
    before, after = Chats(tokenizer), Chats(tmp_path / "whole")
    for row in rows[:2]:
        assert before.samples(row, "") == after.samples(row, "")
    from leanseek.data.loader import TokenDataset
    from leanseek.data.shards import verify

    assert sum(verify(tmp_path / "whole").documents.values()) == 30
    with pytest.raises(DataError, match="holds chats, which `leanseek sft` trains on"):
        TokenDataset(tmp_path / "whole", "train", 8)
