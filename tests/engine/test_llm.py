"""`LLM(path).generate` as users of vLLM know it, and the two commands built on it."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from leanseek import LLM, SamplingParams, Transformer, checkpoint
from leanseek.cli import chat, generate
from leanseek.engine import EngineError, Guide, Tokenizer
from leanseek.errors import InputError
from leanseek.server.templates import ChatTemplate, template_of

SMALL = {"cache_gib": 0.001}


@pytest.fixture(scope="module")
def folder(model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with tokenizer and sampling defaults."""
    path = tmp_path_factory.mktemp("hf") / "model"
    checkpoint.save(model, path, tokenizer_from=tokenizer.file.parent)
    defaults = {"temperature": 0.5, "top_p": 0.9, "do_sample": True, "eos_token_id": [0, 5]}
    (path / "generation_config.json").write_text(json.dumps(defaults))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, **SMALL)


def test_generate_answers_in_the_order_of_the_prompts(llm: LLM, tokenizer: Tokenizer) -> None:
    prompts = ["the quick brown fox", [7, 8, 9], "hello"]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 3, 6)]
    together = llm.generate(prompts, params)
    for prompt, own, output in zip(prompts, params, together, strict=True):
        assert output.prompt == (prompt if isinstance(prompt, str) else None)
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        assert output.prompt_token_ids == ids
        choice = output.outputs[0]
        assert choice.text == tokenizer.decode(choice.token_ids)
        assert choice.usage.completion_tokens == len(choice.token_ids) <= (own.max_tokens or 0)
        assert choice.finish_reason in ("length", "stop")
        alone = llm.generate(prompt if isinstance(prompt, str) else [prompt], own)[0].outputs[0]
        assert alone.token_ids == choice.token_ids


def test_times_begin_when_a_request_came(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, n=2)
    before = time.monotonic()
    outputs = llm.generate(["fox", [7, 8]], params)
    timings = [choice.timing for output in outputs for choice in output.outputs]
    timings += [delta.timing for delta in llm.stream([9], params) if delta.timing]
    assert len(timings) == 6
    for t in timings:
        assert before <= t.arrived <= t.scheduled <= t.first_token <= t.finished <= time.monotonic()


def test_choices_logprobs_and_prompt_logprobs(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=4, min_tokens=4, logprobs=2, prompt_logprobs=1)
    output = llm.generate("the lazy dog", params)[0]
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    for choice in output.outputs:
        assert choice.logprobs is not None
        assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
        assert all(len(entry.top) == 2 for entry in choice.logprobs)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_defaults_come_from_generation_config(llm: LLM) -> None:
    assert llm.engine.defaults == {"temperature": 0.5, "top_p": 0.9}
    assert llm.engine.eos_token_ids == {0, 5}
    assert llm.generate("fox", None)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("generation", "defaults", "told"),
    [
        ({"do_sample": False}, {"temperature": 0.0}, []),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}, []),
        ({"do_sample": True, "temperature": 0.6, "top_k": None}, {"temperature": 0.6}, []),
        ({"do_sample": True, "top_k": 50, "max_new_tokens": 9}, {"top_k": 50, "max_tokens": 9}, []),
        ({"temperature": 0.6}, {"temperature": 0.6}, []),
        ({"typical_p": 0.9, "num_beams": 1, "suppress_tokens": [5]}, {}, ["typical_p", "suppress_tokens"]),
        ({"min_new_tokens": 3, "stop_strings": [], "guidance_scale": None}, {}, ["min_new_tokens"]),
    ],
    ids=str,
)
def test_generation_config_as_transformers_reads_it(
    folder: Path, tmp_path: Path, caplog: Any, generation: dict[str, Any], defaults: dict[str, Any], told: list[str]
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    engine = LLM(tmp_path / "model", packed_copy=False, **SMALL).engine
    assert engine.defaults == defaults
    warnings = [record.getMessage() for record in caplog.records if record.name == "leanseek.engine.llm"]
    assert len(warnings) == bool(told) and all(key in warnings[0] for key in told)


def test_a_value_that_cannot_be_in_generation_config_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    for wrong in ({"temperature": "hot"}, {"top_p": 2}, {"top_k": 1.5}, {"max_new_tokens": 0}):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(wrong))
        with pytest.raises(EngineError, match=r"generation_config\.json: (\w+ must|\w+ = .* should) be"):
            LLM(tmp_path / "model", packed_copy=False, **SMALL)


def test_streams_can_be_interleaved_and_left(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = [llm.generate([[p]], params)[0].outputs[0].token_ids for p in (7, 8)]
    a, b = llm.stream([7], params), llm.stream([8], params)
    found: list[list[int]] = [[], []]
    for deltas in zip_longest(a, b):
        for place, delta in enumerate(deltas):
            found[place] += delta.token_ids if delta else []
    assert found == expected
    left: Iterator[Any] = llm.stream([7], params)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert llm.generate([[8]], params)[0].outputs[0].token_ids == expected[1]
    assert not llm.engine.has_work()


def test_threads_share_an_llm(llm: LLM) -> None:
    """Each gets what it would get alone, whole and streamed, also beside one that leaves and one that is refused."""
    settings = [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=1, seed=3, n=2, max_tokens=17),
        SamplingParams(temperature=0.7, seed=5, max_tokens=9, stop=["e"]),
    ]
    jobs = [([7 + i, 8], settings[i % 3]) for i in range(12)]

    def tokens(outputs: list[Any]) -> list[list[int]]:
        return [choice.token_ids for output in outputs for choice in output.outputs]

    def streamed(prompt: list[int], params: SamplingParams) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(params.n)]
        for delta in llm.stream(prompt, params):
            found[delta.index] += delta.token_ids
        return found

    expected = [tokens(llm.generate([prompt], params)) for prompt, params in jobs]
    found: dict[int, list[list[int]]] = {}
    start = threading.Barrier(len(jobs) + 2)

    def work(i: int) -> None:
        prompt, params = jobs[i]
        start.wait()
        found[i] = tokens(llm.generate([prompt], params)) if i % 2 else streamed(prompt, params)

    def leave() -> None:
        start.wait()
        for _ in range(5):
            stream = llm.stream([7], settings[0])
            next(stream)
            stream.close()

    def be_refused() -> None:
        start.wait()
        for _ in range(5):
            with pytest.raises(EngineError, match="empty"):
                llm.generate([[]], settings[0])

    targets = [(work, (i,)) for i in range(len(jobs))] + [(leave, ()), (be_refused, ())]
    threads = [threading.Thread(target=target, args=given, daemon=True) for target, given in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found.get(i) for i in range(len(jobs))] == expected
    llm.generate([[7]], settings[0])  # one more step tells the engine of those that left
    assert not llm.engine.has_work()
    llm.engine.check_invariants()


def test_a_thread_that_comes_later_does_not_wait_for_the_first(llm: LLM) -> None:
    """A long stream is open, and being read, while another thread asks."""
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    answered = threading.Event()

    def ask() -> None:
        llm.generate([[9]], SamplingParams(max_tokens=2))
        answered.set()

    before = 0
    thread = threading.Thread(target=ask, daemon=True)
    for count, _ in enumerate(llm.stream([7], params)):
        if count == 0:
            thread.start()
        before += not answered.is_set()
        if answered.is_set():
            break
    thread.join(60)
    assert answered.is_set() and before < 250
    llm.generate([[7]], params)  # one more step tells the engine that the stream is closed
    assert not llm.engine.has_work()


def test_a_deleted_llm_is_freed(folder: Path) -> None:
    for _ in range(2):
        llm = LLM(folder, **SMALL)
        llm.generate("fox", SamplingParams(max_tokens=3, guided=Guide.regex("a+")))
        kept = [llm, llm.engine, llm.tokenizer, llm.engine._runner.backend, llm.engine._runner.cache]
        references = [weakref.ref(each) for each in kept]
        del llm, kept
        gc.collect()
        assert [reference() for reference in references] == [None] * 5


FORK = """
import os, sys
from leanseek import LLM, SamplingParams
from leanseek.engine import AsyncEngine
folder, options = sys.argv[1], {"cache_gib": 0.001}
llm = LLM(folder, **options)
params = SamplingParams(temperature=0, max_tokens=3)
ask = {
    "generate": lambda: llm.generate("fox", params),
    "stream": lambda: next(llm.stream([7], params)),
    "another LLM": lambda: LLM(folder, **options),
    "an AsyncEngine": lambda: AsyncEngine.load(folder, **options),
}
first = llm.generate("fox", params)[0].outputs[0].token_ids
for name, call in ask.items():
    if os.fork() == 0:
        try:
            call()
            print(name, "answered", flush=True)
        except Exception as error:
            print(name, type(error).__name__, error, flush=True)
        os._exit(0)
    os.wait()
print("parent", llm.generate("fox", params)[0].outputs[0].token_ids == first)
"""


def test_a_forked_child_says_what_is_wrong(folder: Path) -> None:
    """It has none of OpenMP's threads: a step would wait for them for ever."""
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    *children, parent = result.stdout.splitlines()
    for name, line in zip(("generate", "stream", "another LLM", "an AsyncEngine"), children, strict=True):
        assert line.startswith(f"{name} EngineError this process was forked from process ") and '"spawn"' in line
    assert parent == "parent True"


def test_one_bad_prompt_refuses_all_before_any_runs(llm: LLM) -> None:
    with pytest.raises(EngineError):
        llm.generate(["fox", []], SamplingParams())
    with pytest.raises(EngineError, match="2 prompts came with 1"):
        llm.generate(["fox", "dog"], [SamplingParams()])
    assert not llm.engine.has_work()


def test_a_device_that_is_not_there_is_one_line(folder: Path) -> None:
    with pytest.raises(EngineError, match="device = 'cuda:99'") as error:
        LLM(folder, device="cuda:99")
    assert "\n" not in str(error.value)


def test_without_a_tokenizer_only_token_ids_are_served(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    llm = LLM(tmp_path / "bare", **SMALL)
    assert llm.generate([[3, 4]], SamplingParams(max_tokens=3))[0].outputs[0].text == ""
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        llm.generate("fox")


# ---- commands ----


@pytest.fixture
def command(small_cache: None) -> Callable[..., Any]:
    """command(*arguments, input=...): run a command and return its result."""
    app = typer.Typer()
    app.command()(generate.generate)
    app.command()(chat.chat)
    return lambda *arguments, input=None: CliRunner().invoke(app, arguments, input=input)


def test_generate_streams_the_text(command: Callable, folder: Path, llm: LLM) -> None:
    result = command("generate", str(folder), "the quick", "--max-tokens", "8", "--temperature", "0")
    assert result.exit_code == 0, result.output
    text = llm.generate("the quick", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    assert result.stdout == "the quick" + text + "\n"


def test_generate_prints_one_json_object(command: Callable, folder: Path) -> None:
    arguments = ("generate", str(folder), "-", "--max-tokens", "8", "--seed", "3", "--json")
    first, second = (json.loads(command(*arguments, input="the quick").stdout) for _ in range(2))
    assert first["text"] == second["text"]
    assert first["usage"]["completion_tokens"] == len(first["token_ids"])
    assert first["finish_reason"] in ("length", "stop")


def test_generate_names_a_bad_folder(command: Callable, tmp_path: Path) -> None:
    result = command("generate", str(tmp_path / "nothing"), "x")
    assert isinstance(result.exception, InputError)
    assert "nothing" in str(result.exception)


def test_chat_ends_an_answer_where_the_template_says(command: Callable, folder: Path, tmp_path: Path) -> None:
    """A base model's script ends where the user would speak; `--chat-template` takes the place of it all."""
    seen: list[Any] = []

    class Script(LLM):
        def stream(self, prompt: Any, params: Any = None) -> Any:
            seen.append((self.tokenizer.decode(prompt, False), params.stop))
            return super().stream(prompt, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leanseek.engine.LLM", Script)
        template = tmp_path / "own.jinja"
        template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
        for options in ((), ("--chat-template", str(template))):
            result = command("chat", str(folder), "--max-tokens", "2", *options, input="hi\n")
            assert result.exit_code == 0, result.output
    assert seen == [("<end>User: hi\n\nAssistant:", ("\nUser:",)), ("[hi]", None)]
    result = command("chat", str(folder), "--chat-template", str(tmp_path / "none.jinja"), input="hi\n")
    assert isinstance(result.exception, InputError) and "none.jinja is not a file" in str(result.exception)


def test_chat_interrupted_before_the_first_token(folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    template = template_of(llm.tokenizer, llm.engine.config)
    monkeypatch.setattr(llm.engine, "step", interrupt)
    answer, figures = chat._answer(llm, template, [{"role": "user", "content": "hi"}], SamplingParams())
    assert answer == "" and re.fullmatch(r"stopped after \d+\.\d\d s, before the first token", figures)


def test_chat_survives_an_interrupt_wherever_it_comes(
    command: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the template renders, and while the text is encoded: the next line is answered."""
    places = iter([(ChatTemplate, "render"), (Tokenizer, "encode")])

    def interrupt(*_: Any, **__: Any) -> None:
        interrupting.undo()
        raise KeyboardInterrupt

    def read() -> str | None:
        if place := next(places, None):
            interrupting.setattr(*place, interrupt)
        return next(lines, None)

    interrupting, lines = pytest.MonkeyPatch(), iter(["one", "two", "three"])
    monkeypatch.setattr(chat, "_read", read)
    result = command("chat", str(folder), "--max-tokens", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("stopped\n") == 2 and result.stdout.count("tokens/s") == 1


def test_chat_keeps_the_conversation(command: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model sees after each line: the system prompt and the turns so far; /reset forgets the turns."""
    seen: list[list[tuple[str, str]]] = []
    ask = chat._answer

    def record(llm: LLM, template: Any, messages: list[dict[str, str]], params: SamplingParams) -> tuple[str, str]:
        seen.append([(m["role"], m["content"]) for m in messages])
        return ask(llm, template, messages, params)

    monkeypatch.setattr(chat, "_answer", record)
    lines = ["/system be brief", "hi", "and you?", "/reset", "hello", "/unknown", "/exit", "never read"]
    result = command("chat", str(folder), "--max-tokens", "4", "--temperature", "0", input="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    roles = [[role for role, _ in turn] for turn in seen]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert seen[0][0] == ("system", "be brief")
    assert seen[2][1] == ("user", "hello")
    assert "tokens/s" in result.stdout
