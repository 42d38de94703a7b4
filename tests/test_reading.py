"""Files from outside: whatever is wrong with one comes out as one line that names it."""

import os
from pathlib import Path

import pytest

from leanseek.config import ConfigError, ModelConfig
from leanseek.errors import InputError
from leanseek.reading import Structure, checked, read_bytes, read_json, read_text, read_toml, shorten


class Failure(InputError):
    pass


def refused(function, *arguments, says: str) -> None:
    with pytest.raises(Failure) as caught:
        function(*arguments, Failure)
    message = str(caught.value)
    assert says in message and "\n" not in message and len(message) < 600, message


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff{"名": "é"}'.encode())
    assert read_text(path) == '{"名": "é"}'
    assert read_json(path) == {"名": "é"}
    path.write_bytes(b'{"a": "\xe9"}')
    refused(read_json, path, says="not UTF-8 at byte 7")


@pytest.mark.timeout(10)
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe with no writer would wait for ever; so would a device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "."):
        refused(read_bytes, tmp_path / name, says="regular file")
    refused(read_bytes, tmp_path / "absent", says="No such file")
    refused(read_bytes, tmp_path / "a\0b", says="null")


def test_size_is_bounded_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no disk
    refused(read_bytes, path, says="1,099,511,627,776 bytes")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"), ("[1]", "JSON object"), ("[" * 100_000, "brackets"), ('{"a": ' * 100_000, "brackets"),
        ('{"a": Infinity}', "Infinity"), ('{"a": NaN}', "NaN"), ('{"a": 1e999}', "too large for a number"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"), ('{"a": 1, "b": 2, "a": 3}', "'a' appears twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' appears twice"), ("\x00", "not valid JSON"),
    ],
)  # fmt: skip
def test_json_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    refused(read_json, path, says=says)


@pytest.mark.parametrize("text", ["x = ", "x = " + "[" * 100_000, "[a]\n[a]", "x = 1\nx = 2", "é"])
def test_toml_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text, encoding="utf-8")
    refused(read_toml, path, says="x.toml")


class Sample(Structure):
    count: int
    share: float = 1.0
    name: str | None = None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "F has no count"), ({"count": "1"}, "count = '1'"), ({"count": True}, "count = True"),
        ({"count": 1.0}, "count = 1.0"), ({"count": 1, "share": "x" * 10_000}, "share = 'xxx"),
        ({"count": 1, "name": ["\x1b[31m"]}, "name = "), ({"count": 1, "share": float("nan")}, "finite"),
    ],
)  # fmt: skip
def test_structures_are_strict(value: dict, says: str) -> None:
    with pytest.raises(Failure) as caught:
        checked(Sample, value, "F", Failure)
    assert says in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_message_is_one_printable_line() -> None:
    assert shorten("a\nb\x1b[0m\u2028c") == "a\ufffdb\ufffd[0m\ufffdc"
    assert len(shorten("x" * 10_000_000)) == 60


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9), ("n_routed_experts", 10**7), ("qk_rope_head_dim", 10**9), ("hidden_size", True),
        ("hidden_size", "64"), ("hidden_size", 64.0), ("hidden_size", -1), ("norm_topk_prob", "false"),
        ("norm_topk_prob", 1), ("rms_norm_eps", float("inf")), ("rms_norm_eps", "1e-6"), ("rope_theta", 0),
        ("rope_theta", float("nan")), ("eos_token_id", [1, None]), ("eos_token_id", 10**9), ("bos_token_id", -1),
        ("bos_token_id", 96), ("max_position_embeddings", 0), ("rope_scaling", "yarn"), ("rope_scaling", [1]),
        ("rope_scaling", {"type": "yarn"}), ("rope_scaling", {"type": "yarn", "factor": "40"}),
        ("rope_scaling", {"type": 7}), ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}),
        ("model_type", None), ("model_type", ["deepseek_v3"]), ("n_group", "8"), ("num_mtp_layers", "1"),
        ("tie_word_embeddings", None), ("scoring_func", "relu"), ("hidden_act", 3), ("attention_bias", "no"),
        ("rope_theta", {"a": 1}), ("q_lora_rank", [1]), ("first_k_dense_replace", -1), ("initializer_range", -0.1),
    ],
)  # fmt: skip
def test_a_published_config_is_checked_key_by_key(tiny_config, key: str, value: object) -> None:
    hf = tiny_config().to_hf()
    hf.pop("rope_parameters")
    hf |= {key: value}
    if key in ("num_mtp_layers",):
        hf.pop("num_nextn_predict_layers")
    if key == "tie_word_embeddings":  # null: the default
        assert ModelConfig.from_hf(hf) == tiny_config()
        return
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(hf)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def test_yarn_survives_a_default_beside_it(tiny_config) -> None:
    """transformers 5 writes `rope_parameters` next to the published `rope_scaling`."""
    hf = tiny_config().to_hf() | {"rope_scaling": {"type": "yarn", **YARN}}
    assert hf["rope_parameters"]["rope_type"] == "default"
    assert ModelConfig.from_hf(hf).rope_scaling is not None
    hf["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}
    assert ModelConfig.from_hf(hf).rope_scaling is not None
    for contradiction in (
        {"rope_parameters": {"rope_type": "yarn", **YARN, "factor": 8.0}}, {"rope_theta": 5.0},
        {"rope_scaling": {"type": "yarn", "rope_type": "default", **YARN}},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="keep one"):
            ModelConfig.from_hf(hf | contradiction)


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_yarn_needs_a_base_above_one(tiny_config, theta: float) -> None:
    hf = tiny_config().to_hf() | {"rope_parameters": {"rope_type": "yarn", **YARN, "rope_theta": theta}}
    hf["rope_theta"] = theta
    with pytest.raises(ConfigError, match="rope_theta"):
        ModelConfig.from_hf(hf)


def test_whole_numbers_become_floats(tiny_config) -> None:
    assert isinstance(tiny_config(rope_theta=50000).rope_theta, float)
