"""Exports GGUF for llama.cpp's `deepseek2`: absorbed MLA, stacked experts, no MTP (llama.cpp does not load it)."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from leanseek.checkpoint import blocks
from leanseek.checkpoint.files import CheckpointError, Lazy
from leanseek.checkpoint.finite import Census
from leanseek.checkpoint.hf import open_checkpoint, resolve
from leanseek.checkpoint.tokenizer import tokenizer_json
from leanseek.config import ModelConfig
from leanseek.reading import Structure, TokenId, check_links, checked, read_optional_json, read_text
from leanseek.tokens import CONFIG, Names, around, named, named_token, open_tokenizer
from leanseek.writing import partial_folder, writing

_TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
_TORCH = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_FILE_TYPES = {
    Type.F32: gguf.LlamaFileType.ALL_F32,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


def export_gguf(
    source: str | Path,
    out: str | Path,
    dtype: str = "auto",
    tokenizer_from: str | Path | None = None,
    allow_links: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Write the checkpoint `source` (a folder or a run) as one GGUF file, a matrix at a time, without building a model.

    dtype: f32, f16, bf16, q8_0, or auto: as stored (FP8 as bf16). Norms, gates and biases are always f32. Without a
    tokenizer the file accepts token ids only.

    Raises:
        CheckpointError: `source` is broken (as in `load`), `out` exists or cannot be written, llama.cpp would compute
            or read something else, or a tokenizer file is a link out of its folder (unless `allow_links`).
        RunError: the disk is full.
    """
    folder, out = resolve(source, allow_links), Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another path or remove it")
    if dtype not in (*_TYPES, "auto"):
        raise CheckpointError(f"GGUF type {dtype!r} is not one of auto, {', '.join(_TYPES)}")
    if tokenizer_from is not None and not allow_links:
        check_links(beside if (beside := Path(tokenizer_from)).is_dir() else beside.parent, CheckpointError)
    model, stored = open_checkpoint(folder)
    if reason := unsupported_by_llama_cpp(model.config):
        raise CheckpointError(f"llama.cpp's deepseek2 cannot compute this network: {reason}")
    census = Census()
    wanted = {name: census.watched(Lazy(name, s.dtype, s.shape, s.read)) for name, s in stored.items()}
    tensors = {lazy.name: lazy for lazy in blocks.dequantized(wanted)}
    if dtype == "auto":
        common = {torch.bfloat16: "bf16", torch.float16: "f16"}
        dtype = common.get(tensors["model.layers.0.self_attn.o_proj.weight"].dtype, "f32")
    with writing(out, error=CheckpointError), partial_folder(out) as folder_of_it:
        partial = folder_of_it / out.name
        writer = gguf.GGUFWriter(partial, "deepseek2")
        _describe(writer, model.config, folder.name, _TYPES[dtype])
        _add_sampling(writer, folder)
        _add_tokenizer(writer, model.config, Path(tokenizer_from) if tokenizer_from else folder, folder)
        _write(writer, list(_matrices(tensors, model.config, _TYPES[dtype])))
        census.judge(allow_nonfinite)
        partial.replace(out)


def unsupported_by_llama_cpp(config: ModelConfig) -> str | None:
    """Why llama.cpp would refuse the file or compute something else; None if it would not."""
    c = config
    if c.attention != "mla":
        return f"attention = {c.attention!r}"
    if c.num_labels:
        return "a reward model"
    if not c.rope_interleave:
        return "rope_interleave = false"
    if c.q_lora_rank and (c.num_hidden_layers in (26, 27) or (c.num_hidden_layers, c.vocab_size) == (48, 128256)):
        return f"it takes {c.num_hidden_layers} layers for a Lite model, without q_lora_rank"
    yarn = c.rope_scaling
    if yarn and (yarn.attention_factor or not yarn.mscale_all_dim or yarn.mscale != yarn.mscale_all_dim):
        return "it assumes that YaRN's mscale equals mscale_all_dim"
    if not c.n_routed_experts:
        return None
    if c.moe_layer_freq != 1:
        return f"moe_layer_freq = {c.moe_layer_freq}"
    if not c.n_shared_experts:
        return "routed experts without a shared one"
    if c.grouped_routing and c.topk_method == "group_limited_greedy":
        return "it scores a group by its two best experts, group_limited_greedy by the best"
    return None


def _describe(writer: gguf.GGUFWriter, c: ModelConfig, name: str, file_type: Type) -> None:
    """Metadata with the keys of llama.cpp's deepseek2, for which absorbed MLA is attention with one key head."""
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_q_lora_rank(c.q_lora_rank or 0)  # the loader requires the key; 0 means none
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_key_length(c.cache_width)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    if yarn := c.rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)
        if (yarn.beta_fast, yarn.beta_slow) != (32.0, 1.0):  # Kimi-K2; deepseek2's loader does not read the keys
            options = f"--yarn-beta-fast {yarn.beta_fast} --yarn-beta-slow {yarn.beta_slow}"
            warnings.warn(f"llama.cpp must be run with {options}: it does not take them from the file", stacklevel=3)
    else:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    dense = c.first_k_dense_replace if c.n_routed_experts else c.num_hidden_layers
    writer.add_leading_dense_block_count(min(dense, c.num_hidden_layers))
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_shared_count(c.n_shared_experts)
    if not c.n_routed_experts:
        return
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    sigmoid = c.scoring_func == "sigmoid"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    if c.grouped_routing and c.topk_group < c.n_group:
        writer.add_expert_group_count(c.n_group)
        writer.add_expert_group_used_count(c.topk_group)


# ---- tensors ----


class _Matrix(NamedTuple):
    """A GGUF tensor: the concatenation of `pieces`, which are made one at a time."""

    name: str
    shape: tuple[int, ...]
    type: Type
    pieces: list[Callable[[], Tensor]]


def _matrices(tensors: Mapping[str, Lazy], c: ModelConfig, wide: Type) -> Iterator[_Matrix]:
    """The main model's tensors under GGUF names, with a layer's experts stacked and kv_b_proj split (2.1.1)."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, c.num_hidden_layers)

    def matrix(name: str, shape: tuple[int, ...], pieces: list[Callable[[], Tensor]]) -> _Matrix:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise AssertionError(f"gguf has no name for {name}")
        kind = wide
        if len(shape) == 1 or name.endswith("mlp.gate.weight"):
            kind = Type.F32
        elif wide == Type.Q8_0 and shape[-1] % 32:
            kind = Type.F16  # Q8_0 packs 32 values of a row
        return _Matrix(found, shape, kind, pieces)

    for name, lazy in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if (layer and int(layer[1]) >= c.num_hidden_layers) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name)
        if expert:
            if expert[2] == "0":
                stack = [tensors[f"{expert[1]}.{e}.{expert[3]}"].make for e in range(c.n_routed_experts)]
                yield matrix(f"{expert[1]}.{expert[3]}", (c.n_routed_experts, *lazy.shape), stack)
        elif name.endswith(".kv_b_proj.weight"):
            h, r, base = c.num_attention_heads, c.kv_lora_rank, name.removesuffix("kv_b_proj.weight")
            k, v = (lambda w=lazy: _up(w, c, 0).mT, lambda w=lazy: _up(w, c, 1))
            yield matrix(f"{base}k_b_proj.weight", (h, r, c.qk_nope_head_dim), [k])
            yield matrix(f"{base}v_b_proj.weight", (h, c.v_head_dim, r), [v])
        else:
            yield matrix(name.replace("e_score_correction_bias", "e_score_correction.bias"), lazy.shape, [lazy.make])


def _up(kv_b: Lazy, c: ModelConfig, which: int) -> Tensor:
    """W_UK [H, nope, kv_lora_rank] (0) or W_UV [H, v, kv_lora_rank] (1) of kv_b_proj."""
    heads = kv_b.make().unflatten(0, (c.num_attention_heads, -1))
    return heads.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)[which]


def _write(writer: gguf.GGUFWriter, matrices: list[_Matrix]) -> None:
    for m in matrices:
        writer.add_tensor_info(m.name, m.shape, np.dtype(np.float32), _nbytes(m), raw_dtype=m.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for m in matrices:
        data = np.empty(_nbytes(m), dtype=np.uint8)
        size = len(data) // len(m.pieces)
        for i, piece in enumerate(m.pieces):
            data[i * size : (i + 1) * size] = _encode(piece(), m.type)
        writer.write_tensor_data(data)
    writer.close()


def _nbytes(m: _Matrix) -> int:
    values, size = gguf.GGML_QUANT_SIZES[m.type]
    return int(np.prod(m.shape)) // values * size


def _encode(tensor: Tensor, kind: Type) -> np.ndarray[Any, Any]:
    """The tensor's bytes, flat uint8."""
    if kind in _TORCH:
        return tensor.to(_TORCH[kind]).contiguous().flatten().view(torch.uint8).numpy()
    return gguf.quantize(tensor.float().contiguous().numpy(), kind).reshape(-1)


# ---- tokenizer ----


class _Model(Structure):
    type: str
    vocab: dict[str, TokenId] = Field(default_factory=dict)
    merges: list[str | list[str]] = Field(default_factory=list)


class _Added(Structure):
    id: TokenId
    content: str
    special: bool


class _Step(Structure):
    type: str
    pattern: dict[str, str] | None = None
    behavior: str | None = None
    invert: bool | None = None


class _Splitting(_Step):
    pretokenizers: list[_Step] | None = None


class _Normalizer(Structure):
    type: str


class _Spec(Structure):
    """The keys that we read from a tokenizer.json."""

    model: _Model
    added_tokens: list[_Added]
    normalizer: _Normalizer | None = None
    pre_tokenizer: _Splitting | None = None


def _add_tokenizer(writer: gguf.GGUFWriter, c: ModelConfig, source: Path, folder: Path) -> None:
    """Writes `source`'s byte-level BPE as llama.cpp's `gpt2` model, with the end tokens of `folder` as well."""
    path = tokenizer_json(source)
    if path is None:
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = open_tokenizer(path)
    spec = json.loads(tokenizer.to_str())
    checked(_Spec, spec, str(path), CheckpointError)
    if spec["model"]["type"] != "BPE":
        raise CheckpointError(f"{path} is not a byte-level BPE, which llama.cpp's gpt2 tokenizer needs")
    tokens = [f"[PAD{i}]" for i in range(c.vocab_size)]  # names for embeddings beyond the vocabulary
    types = [gguf.TokenType.UNUSED] * c.vocab_size
    known = {number: (token, gguf.TokenType.NORMAL) for token, number in spec["model"]["vocab"].items()}
    for added in spec["added_tokens"]:
        control = added["special"] or re.fullmatch(r"<[|｜].*[|｜]>", added["content"])
        known[added["id"]] = added["content"], gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    if max(known) >= c.vocab_size:
        raise CheckpointError(f"{path} has token {max(known)}, beyond the model's vocab_size of {c.vocab_size}")
    for number, (token, kind) in known.items():
        tokens[number], types[number] = token, kind
    _check_merging(path, spec)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(path, spec))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([_merge(pair) for pair in spec["model"]["merges"]])
    # files beside a tokenizer with another name belong to some other tokenizer
    _add_special(writer, tokenizer, path.parent if path.name == "tokenizer.json" else None, c, folder)


def _merge(pair: list[str] | str) -> str:
    """Both parts of a merge, separated by a blank; blanks inside a part become Ġ, as in byte-level tokens."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)


def _add_special(
    writer: gguf.GGUFWriter, tokenizer: Tokenizer, beside: Path | None, c: ModelConfig, folder: Path
) -> None:
    """Writes which tokens begin and end a text, which of them encoding adds, and the chat templates."""
    config = read_optional_json(beside / CONFIG, CheckpointError) if beside else {}
    checked(Names, config, f"{beside}/{CONFIG}", CheckpointError)
    begin, end = (named_token(beside, key, tokenizer) if beside else None for key in ("bos_token", "eos_token"))
    bos = c.bos_token_id if begin is None else begin
    ends = _ends(end, c, folder)
    before, after = around(tokenizer)
    if config.get("add_bos_token") and bos is not None and not before:
        before = [bos]
    if before not in ([], [bos]) or after not in ([], [ends.get("eos")]):
        raise CheckpointError(
            f"{beside or 'the tokenizer'} puts the tokens {before} before a text and {after} after it; llama.cpp puts "
            f"there only the first token, {bos}, and the end token, {ends.get('eos')}"
        )
    if bos is not None:
        writer.add_bos_token_id(bos)
    for key, token in ends.items():
        {"eos": writer.add_eos_token_id, "eot": writer.add_eot_token_id, "eom": writer.add_eom_token_id}[key](token)
    for key, add in (("unk_token", writer.add_unk_token_id), ("pad_token", writer.add_pad_token_id)):
        name = named(config.get(key))
        if isinstance(name, str) and (found := tokenizer.token_to_id(name)) is not None:
            add(found)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    if beside and (template := _chat_template(beside, config)):
        writer.add_chat_template(template)


def _chat_template(beside: Path, config: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The folder's template, or templates by name. A file takes precedence over tokenizer_config.json."""
    file = beside / "chat_template.jinja"
    if not file.is_file():
        return config.get("chat_template")
    more = sorted((beside / "additional_chat_templates").glob("*.jinja"))
    own = read_text(file, CheckpointError)
    others = [{"name": path.stem, "template": read_text(path, CheckpointError)} for path in more]
    return [{"name": "default", "template": own}, *others] if others else own


def _ends(first: int | None, c: ModelConfig, folder: Path) -> dict[str, int]:
    """The tokens that end an answer, under the three keys at which llama.cpp stops."""
    listed = _generation(folder).get("eos_token_id")
    ends = [first, *(listed if isinstance(listed, list) else [listed]), *c.eos_token_ids]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if len(ends) > 3:
        warnings.warn(f"a GGUF file holds three end tokens; llama.cpp will not stop at {ends[3:]}", stacklevel=5)
    return dict(zip(("eos", "eot", "eom"), ends, strict=False))


def _generation(folder: Path) -> dict[str, Any]:
    return read_optional_json(folder / "generation_config.json", CheckpointError)


def _add_sampling(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Writes the defaults of generation_config.json that have a key in GGUF."""
    generation = _generation(folder)
    keys: tuple[tuple[str, Callable[[Any], None], type], ...] = (
        ("temperature", writer.add_sampling_temp, float),
        ("top_p", writer.add_sampling_top_p, float),
        ("top_k", writer.add_sampling_top_k, int),
        ("min_p", writer.add_sampling_min_p, float),
        ("repetition_penalty", writer.add_sampling_penalty_repeat, float),
    )
    for key, add, kind in keys:
        if isinstance(value := generation.get(key), int | float):
            add(kind(value))


# How V3's tokenizer.json splits a text before the merges; the ones that we train do the same (data/tokenizer.py).
_V3_PATTERNS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]


def _check_merging(path: Path, spec: dict[str, Any]) -> None:
    """Refuse options that llama.cpp ignores when it merges and when it looks for added tokens in a text.

    Raises:
        CheckpointError: the model would read other tokens.
    """
    parts = [("model", spec["model"], ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))]
    parts += [(f"token {t['content']!r}", t, ("lstrip", "rstrip", "single_word")) for t in spec["added_tokens"]]
    for what, part, keys in parts:
        for key in keys:
            if part.get(key):
                raise CheckpointError(f"{path}: its {what} has {key}, which llama.cpp does not apply")


def pre_tokenizer_name(path: Path, spec: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer.json at `path` splits text before the merges.

    Raises:
        CheckpointError: llama.cpp has no name for it, or there is a normalizer, which llama.cpp ignores. In both cases
            the model would read other tokens.
    """
    normalizer = spec.get("normalizer")
    if normalizer and normalizer != {"type": "Sequence", "normalizers": []}:
        raise CheckpointError(f"{path} has a normalizer ({normalizer.get('type')}), which llama.cpp does not apply")
    top = spec.get("pre_tokenizer") or {}
    steps = top.get("pretokenizers", [top] if top else [])
    splits = [step for step in steps if step["type"] == "Split"]
    patterns = [step["pattern"].get("Regex", "") for step in splits]
    isolated = all(step.get("behavior") == "Isolated" and not step.get("invert") for step in splits)
    last = steps[-1] if steps else {}
    whole = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if whole and isolated and patterns == _V3_PATTERNS and len(steps) == 4 and not last.get("use_regex", True):
        return "deepseek-v3"
    # V2: the letters of words are listed, and digits are split one by one
    if patterns[:1] in (["[\r\n]"], [r"[\r\n]"]) and len(patterns) == 5 and patterns[1].startswith(r"\s?[A-Za-zµ"):
        return "deepseek-llm"
    if whole and len(steps) == 1 and last.get("use_regex", True):
        return "gpt-2"
    raise CheckpointError(
        f"{path} splits text in a way that llama.cpp has no name for, so it would read other tokens than the model was "
        "trained on; give --tokenizer, or train on shards whose tokenizer is V3's or made by this version"
    )
