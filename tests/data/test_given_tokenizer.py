"""What a given tokenizer knows arrives: in the shards, in the model trained on them, in its exports and its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from leanseek import LLM, InputError, SamplingParams, checkpoint
from leanseek.data.loader import TokenDataset
from leanseek.data.prepare import prepare
from leanseek.data.tokenizer import load_tokenizer
from leanseek.engine import Tokenizer
from leanseek.training import RunConfig, train
from tests.small import pair_tokenizer, run_toml

TEXTS = [f"the king {i} shall speak of war and of honour" for i in range(60)]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|stop|>{% endfor %}"
MODEL = run_toml(
    {"vocab_size": 320, "num_nextn_predict_layers": 0},
    data={"seq_len": 16, "fim_rate": 0.0},
    train={"steps": 2, "batch_size": 2},
)
pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with a tokenizer.json whose tokens have names of their own, and that stores every state it can."""
    inner = pair_tokenizer("\n".join(TEXTS), 300, ["<|go|>", "<|pad|>", "<|stop|>", "<|turn|>"])
    inner.enable_truncation(3)
    inner.enable_padding(length=50, pad_token="<|pad|>", pad_id=1)
    folder = tmp_path / "given"
    folder.mkdir()
    stored = json.loads(inner.to_str())
    stored["model"]["dropout"] = 0.9
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def write(folder: Path, name: str, **values: Any) -> None:
    (folder / name).write_text(json.dumps(values))


def shards(given: Path, out: str = "shards") -> TokenDataset:
    folder = given.parent / out
    prepare([given.parent / "text.jsonl"], folder, tokenizer=given, validation_fraction=0.2, workers=1)
    return TokenDataset(folder, "train", 16)


@pytest.mark.parametrize(
    ("name", "values", "special"),
    [
        ("tokenizer_config.json", {"eos_token": "<|stop|>"}, (None, (2,), ())),
        ("tokenizer_config.json", {"eos_token": {"content": "<|stop|>"}, "bos_token": "<|go|>"}, (0, (2,), ())),
        (
            "tokenizer_config.json",
            {"eos_token": "<|stop|>", "bos_token": "<|go|>", "add_bos_token": True},
            (0, (2,), (0,)),
        ),
        ("special_tokens_map.json", {"eos_token": "<|turn|>", "bos_token": {"content": "<|go|>"}}, (0, (3,), ())),
        ("generation_config.json", {"eos_token_id": [3, 2], "bos_token_id": 0}, (0, (3, 2), ())),
        ("config.json", {"eos_token_id": 3}, (None, (3,), ())),
    ],
)
def test_the_end_token_is_the_one_that_a_file_names(
    given: Path, name: str, values: dict[str, Any], special: tuple[int | None, tuple[int, ...], tuple[int, ...]]
) -> None:
    write(given, name, **values)
    data = shards(given)
    assert tuple(data.special) == special
    tokenizer = load_tokenizer(given)
    for document, text in zip(range(3), (t for t in TEXTS if t), strict=False):
        ids = data.shards[0][data.starts[document] : data.ends[document]].tolist()
        assert tuple(ids[: len(special[2])]) == special[2]
        assert ids[-1] == special[1][0]
        found = tokenizer.decode(ids[len(special[2]) : -1])
        assert found in TEXTS, text
        assert ids[len(special[2]) : -1] == tokenizer.encode(found, add_special_tokens=False).ids


def test_what_the_post_processor_puts_before_a_text_is_before_a_document(given: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(given / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single="<|go|> $A", special_tokens=[("<|go|>", 0)])
    inner.save(str(given / "tokenizer.json"))
    write(given, "tokenizer_config.json", eos_token="<|stop|>", bos_token="<|go|>")
    data = shards(given)
    assert data.special.leading == (0,)
    assert (data.shards[0][data.starts] == 0).all()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "<|nope|>"}, "names eos_token '<|nope|>', which is not in"),
        ("tokenizer_config.json", {"eos_token": 3}, "names eos_token 3, which is not in"),
        ("generation_config.json", {"eos_token_id": 9999}, "names eos_token_id 9999, which is not in"),
        ("generation_config.json", {"eos_token_id": [True]}, "names eos_token_id True"),
        ("generation_config.json", {"eos_token_id": -1}, "names eos_token_id -1"),
        ("tokenizer_config.json", {}, "none of the end-of-document tokens"),
    ],
)
def test_a_file_that_contradicts_the_tokenizer_is_refused(
    given: Path, name: str, values: dict[str, Any], message: str
) -> None:
    write(given, name, **values)
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        shards(given)
    assert not (given.parent / "shards" / "tokenizer.json").exists()


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '{"eos_token": "\\ud800"}'])
def test_a_broken_file_beside_the_tokenizer_is_named(given: Path, content: str) -> None:
    (given / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        shards(given)


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_from_a_given_tokenizer_to_the_exports(given: Path, tmp_path: Path, as_file: bool) -> None:
    """prepare, train, generate, export: everywhere the same tokens begin and end a text."""
    from transformers import AutoTokenizer, GenerationConfig  # not in the environment of the lowest versions

    write(given, "tokenizer_config.json", eos_token="<|stop|>", bos_token="<|go|>", tokenizer_class="GPT2Tokenizer")
    write(given, "generation_config.json", eos_token_id=[2, 3], temperature=0.1)
    (given / "chat_template.jinja").write_text(TEMPLATE)
    folder = tmp_path / "shards"
    source = given / "tokenizer.json" if as_file else given
    prepare([tmp_path / "text.jsonl"], folder, tokenizer=source, validation_fraction=0.2, workers=1)
    stored = json.loads((folder / "tokenizer.json").read_text())
    assert (stored["model"]["dropout"], stored["padding"], stored["truncation"]) == (None, None, None)
    (tmp_path / "run.toml").write_text(MODEL)
    run = train(RunConfig.load(str(tmp_path / "run.toml"), [f"data.path={folder}"]), runs=tmp_path).folder
    assert RunConfig.load(str(run / "config.toml"), []).model.eos_token_id == (2, 3)

    written = checkpoint.resolve(run)
    checkpoint.save(checkpoint.load(run), tmp_path / "hf", "hf", written)
    for place in (written, tmp_path / "hf"):
        for name in ("config.json", "generation_config.json"):
            found = json.loads((place / name).read_text())
            assert (found["bos_token_id"], found["eos_token_id"]) == (0, [2, 3]), place / name
        assert (place / "chat_template.jinja").read_text() == TEMPLATE
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.chat_template) == (0, 2, TEMPLATE)
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [2, 3]

    checkpoint.export_gguf(run, tmp_path / "out.gguf", "f32", written)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert int(fields["tokenizer.ggml.eos_token_id"].parts[-1][0]) == 2
    assert int(fields["tokenizer.ggml.bos_token_id"].parts[-1][0]) == 0

    llm = LLM(run, cache_gib=0.01)
    ids = llm.engine.tokenizer.encode(TEXTS[0])
    assert ids == theirs(TEXTS[0])["input_ids"] == load_tokenizer(given).encode(TEXTS[0], add_special_tokens=False).ids
    for end in (2, 3):
        (answer,) = llm.generate([TEXTS[0]], SamplingParams(max_tokens=9, temperature=0, logit_bias={end: 100}))
        assert (answer.outputs[0].finish_reason, answer.outputs[0].token_ids) == ("stop", [end])


def test_state_that_a_tokenizer_stores_is_off_in_the_engine(given: Path) -> None:
    """Padding made one token 50, truncation cut to three, dropout drew other merges every time."""
    from leanseek.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer(given)
    found = {tuple(tokenizer.encode(TEXTS[7])) for _ in range(20)}
    assert len(found) == 1
    assert tokenizer.decode(next(iter(found))) == TEXTS[7]
    assert len(tokenizer.encode("a")) == 1


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_a_broken_configuration_beside_a_served_tokenizer_is_one_line(given: Path, content: str) -> None:
    from leanseek.engine.tokenizer import Tokenizer

    (given / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        Tokenizer(given)


def test_a_long_run_of_one_character_trains_and_encodes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 70_000)
    prepare([tmp_path], tmp_path / "out", train_vocab=300, workers=1)
    sizes = np.load(tmp_path / "out" / "token_bytes.npy")
    assert sizes.max() <= 256
    data = TokenDataset(tmp_path / "out", "train", 16)
    held = TokenDataset(tmp_path / "out", "validation", 16)
    total = sum(int(sizes[shard].sum()) for shard in (*data.shards, *held.shards))
    assert total == 70_000


@pytest.mark.parametrize("class_name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("stored", [None, "byte level", "template"])
def test_transformers_begins_a_text_as_the_documents_began(
    given: Path, tmp_path: Path, class_name: str, stored: str | None
) -> None:
    """`add_bos_token` is heeded by classes of transformers 4; what is prepared says it in the tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer.from_file(str(given / "tokenizer.json"))
    if stored == "byte level":
        inner.post_processor = processors.ByteLevel(trim_offsets=False)
    elif stored == "template":
        inner.post_processor = processors.TemplateProcessing(single="<|go|> $A", special_tokens=[("<|go|>", 0)])
    inner.save(str(given / "tokenizer.json"))
    named = {"bos_token": "<|go|>", "eos_token": "<|stop|>", "add_bos_token": True, "tokenizer_class": class_name}
    (given / "tokenizer_config.json").write_text(json.dumps(named))
    prepare([tmp_path / "text.jsonl"], tmp_path / "out", tokenizer=given, workers=1, validation_fraction=0.0)
    document = np.fromfile(tmp_path / "out/00000.train.bin", np.uint16)[:-1].tolist()
    first = document[: document.index(2)]  # up to the end token of the first document
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert first[0] == 0 and first.count(0) == 1
    assert theirs(TEXTS[0])["input_ids"] == first == Tokenizer(tmp_path / "out").encode(TEXTS[0])
