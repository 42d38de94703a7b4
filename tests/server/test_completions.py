"""/v1/completions as the official client, and evaluation harnesses, use it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from leanseek.server.service import token_text

BOS = "<｜begin▁of▁sentence｜>"


def test_a_completion_whole_and_streamed(serve: Any) -> None:
    served = serve("plain")
    ask = served.openai.completions.create
    answer = ask(model="test-model", prompt="Say", max_tokens=100)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (served.engine.reply, "stop")
    assert served.engine.last_prompt == f"{BOS}Say"
    chunks = list(
        ask(model="test-model", prompt="Say", max_tokens=100, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == served.engine.reply
    assert chunks[-1].usage.prompt_tokens == 4


def test_sixteen_tokens_unless_told_otherwise(serve: Any) -> None:
    served = serve("plain")
    answer = served.openai.completions.create(model="test-model", prompt="Say")
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 16)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_of_texts_or_tokens(serve: Any, stream: bool) -> None:
    """Choices are numbered prompt by prompt."""
    served = serve("plain")
    for prompt in (["a", "b"], [[5, 6], [7]]):
        answer = served.openai.completions.create(
            model="test-model", prompt=prompt, n=2, max_tokens=3, stream=stream, echo=True
        )
        texts = [""] * 4
        for part in answer if stream else [answer]:
            for choice in part.choices:
                texts[choice.index] += choice.text
        prompts = [served.engine.tokenizer.decode(stream.prompt) for stream in served.engine.seen[-2:]]
        assert texts == [prompts[0] + "Hel"] * 2 + [prompts[1] + "Hel"] * 2


def test_one_prompt_of_tokens(serve: Any) -> None:
    served = serve("plain")
    served.openai.completions.create(model="test-model", prompt=[5, 6, 7])
    assert served.engine.last.prompt == [5, 6, 7]


def test_echo_with_logprobs_scores_the_prompt(serve: Any) -> None:
    """What evaluation harnesses ask for: every prompt token but the first, then the one generated."""
    served = serve("plain")
    ids = served.engine.tokenizer.encode("ab c", add_special_tokens=False)
    answer = served.openai.completions.create(model="test-model", prompt=[ids], echo=True, logprobs=1, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "ab cH"
    assert logprobs.tokens == ["a", "b", " ", "c", "H"]
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert logprobs.top_logprobs[0] is None and logprobs.top_logprobs[1] == {"b": -0.5}


def choices(served: Any, stream: bool, **fields: object) -> list[dict[str, Any]]:
    """Text, logprobs and finish_reason of each choice, joined where they come in chunks."""
    answer = served.http.post("/v1/completions", json=fields | {"stream": stream})
    assert answer.status_code == 200, answer.text
    if not stream:
        return list(answer.json()["choices"])
    joined: dict[int, dict[str, Any]] = {}
    for line in answer.text.splitlines():
        if not line or line == "data: [DONE]":
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            whole = joined.setdefault(choice["index"], {"index": choice["index"], "text": "", "logprobs": {}})
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            for name, values in choice["logprobs"].items():
                whole["logprobs"].setdefault(name, []).extend(values)
    return [joined[index] for index in sorted(joined)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "offsets"),
    [
        ({}, "a€é🙃b", [0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4]),  # a part of a character begins where the character does
        ({"max_tokens": 3}, "a\ufffd", [0, 1, 1]),
        ({"stop": "é🙃"}, "a€", [0, 1, 1, 1, 2, 2, 2, 2, 2, 2]),  # what was cut off begins at the end
        ({"stop": "€"}, "a", [0, 1, 1, 1]),
        ({"stop": "bc"}, "a€é🙃b", [0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4]),  # held back, and given out at the end
        ({"echo": True, "max_tokens": 1}, "xya", [0, 0, 1, 2]),  # the text has no <begin of sentence>
        ({"echo": True, "max_tokens": 1, "skip_special_tokens": False}, f"{BOS}xya", [0, 21, 22, 23]),
        ({"echo": True, "max_tokens": 2, "prompt": "é"}, "éa\ufffd", [0, 0, 0, 1, 2]),
        ({"echo": True, "n": 2, "stop": "é"}, "xya€", [0, 0, 1, 2, 3, 3, 3, 4, 4]),
        ({"n": 3, "max_tokens": 2}, "a\ufffd", [0, 1]),
    ],
)
def test_offsets_fit_the_text(serve: Any, stream: bool, fields: dict[str, Any], text: str, offsets: list[int]) -> None:
    served = serve("plain")
    served.engine.reply = "a€é🙃b"
    answer = choices(served, stream, **{"prompt": "xy", "logprobs": 1, "max_tokens": 100} | fields)
    assert len(answer) == fields.get("n", 1)
    for choice in answer:
        found = choice["logprobs"]
        assert (choice["text"], found["text_offset"]) == (text, offsets)
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            whole = not token.startswith(("bytes:", "<｜"))
            assert not whole or offset == len(choice["text"]) or choice["text"][offset:].startswith(token)


@pytest.mark.parametrize("reply", ["€", "é", "🙃", "a"])
def test_parts_of_characters_have_names_of_their_own(serve: Any, reply: str) -> None:
    """Evaluation harnesses look for the token among the keys of top_logprobs."""
    served = serve("plain")
    served.engine.reply = reply
    (choice,) = choices(served, False, prompt="x", logprobs=5)
    spelled = [reply] if reply == "a" else [f"bytes:\\x{byte:02x}" for byte in reply.encode()]
    assert choice["logprobs"]["tokens"] == spelled
    for token, top in zip(spelled, choice["logprobs"]["top_logprobs"], strict=True):
        assert len(top) == 5 and max(top, key=top.__getitem__) == token


def test_an_id_without_a_token_is_named_by_its_number(serve: Any) -> None:
    tokenizer = serve("plain").engine.tokenizer
    assert [token_text(tokenizer, 5000 + place) for place in range(2)] == ["token_id:5000", "token_id:5001"]


@pytest.mark.parametrize(("prompt", "n"), [("ab", 1), (["ab", "ab"], 1), ("ab", 3)])
def test_no_tokens_but_the_prompts(serve: Any, prompt: Any, n: int) -> None:
    served = serve("plain")
    create = served.openai.completions.create
    answer = create(model="test-model", prompt=prompt, echo=True, logprobs=0, max_tokens=0, n=n)
    assert answer.usage and answer.usage.completion_tokens == 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens
    assert answer.choices[0].text == "ab"
    assert answer.choices[0].logprobs.tokens == ["<｜begin▁of▁sentence｜>", "a", "b"]


def test_fill_in_the_middle(serve: Any) -> None:
    served = serve("plain")
    served.openai.completions.create(model="test-model", prompt="def f(", suffix="return x")
    assert served.engine.last_prompt.endswith("<｜fim▁begin｜>def f(<｜fim▁hole｜>return x<｜fim▁end｜>")


def test_fill_in_the_middle_needs_its_tokens(serve: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="fill-in-the-middle"):
        serve("v3").openai.completions.create(model="test-model", prompt="a", suffix="b")


@pytest.mark.parametrize("prompt", ["x" * 600, [5] * 512, [], [[]], [99999], "", None, {"a": 1}, [1, "a"], [-1]])
def test_wrong_prompts_are_refused(serve: Any, prompt: Any) -> None:
    served = serve("plain")
    answer = served.http.post("/v1/completions", json={"prompt": prompt})
    if prompt == "":  # the beginning of a text is a prompt
        assert answer.status_code == 200 and len(served.engine.last.prompt) == 1
        return
    assert answer.status_code == 400, answer.text
    if len(prompt or []) > 500:
        assert answer.json()["error"]["code"] == "context_length_exceeded"
