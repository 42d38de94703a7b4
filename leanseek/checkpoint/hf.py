"""Hugging Face folders and runs, in and out: `load`, `save`, `convert`, and which folder a path means."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanseek import ops
from leanseek.checkpoint import blocks
from leanseek.checkpoint.beside import copy_beside
from leanseek.checkpoint.files import (
    MTP_FILE,
    SINGLE,
    CheckpointError,
    Lazy,
    Stored,
    atomic_folder,
    open_folder,
    read_json,
    write_file,
    write_json,
    write_shards,
)
from leanseek.checkpoint.finite import Census
from leanseek.checkpoint.names import hf_parts, iter_hf_tensors
from leanseek.checkpoint.pieces import Piece
from leanseek.checkpoint.tokenizer import copy_tokenizer
from leanseek.config import ConfigError, ModelConfig
from leanseek.machine.memory import empty, memory
from leanseek.model import Transformer
from leanseek.model.layers import Linear
from leanseek.model.moe import Experts
from leanseek.ops.weights import replace_weight
from leanseek.reading import check_links

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OWN_CONFIG = "leanseek_model"  # key of config.json under which a baseline, which no Hugging Face class holds, is kept


def resolve(path: str | Path, allow_links: bool = False) -> Path:
    """The checkpoint folder a path means: itself, or the newest `checkpoints/step-N` of a run.

    Raises:
        CheckpointError: there is no checkpoint, or one of its files is a link out of it and `allow_links` is not set.
    """
    folder = _resolve(Path(path))
    if not allow_links:
        check_links(folder, CheckpointError)
    return folder


def _resolve(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    steps = {
        int(found[1]): folder
        for folder in path.glob("checkpoints/step-*")
        if (found := re.fullmatch(r"step-(\d+)", folder.name)) and (folder / "config.json").is_file()
    }
    if steps:
        return steps[max(steps)]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    raise CheckpointError(f"{path} has no config.json: it is neither a Hugging Face folder nor a run with a checkpoint")


def read_config(folder: Path) -> ModelConfig:
    """The network of a checkpoint folder.

    Raises:
        CheckpointError: config.json is absent or broken, or describes a network that is not supported.
    """
    values = read_json(folder / "config.json")
    blocks.check_quantization(values)
    try:
        if OWN_CONFIG in values:
            return ModelConfig.from_dict(values[OWN_CONFIG])
        return ModelConfig.from_hf(values)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


# ---- in ----


def open_checkpoint(folder: Path) -> tuple[Transformer, dict[str, Stored]]:
    """A folder's network, on meta, and its tensors, unread, by published name, checked against each other.

    Raises:
        CheckpointError: as `load`.
    """
    config = read_config(folder)
    tensors = open_folder(folder)
    if config.num_nextn_predict_layers and not any(_layer(name) >= config.num_hidden_layers for name in tensors):
        warnings.warn(f"{folder} promises MTP modules but has none; going on without them", stacklevel=3)
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    try:
        _check_sizes(config, tensors)
        model = Transformer(config, device="meta")
        _check(model, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return model, tensors


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    keep_fp8: bool = False,
    allow_links: bool = False,
) -> Transformer:
    """The model of a Hugging Face folder or of a run's newest checkpoint.

    Reads tensor by tensor, so peak memory is the loaded weights and one tensor. `dtype` is torch's or its name;
    "auto" keeps what is stored, FP8 blocks becoming BF16, float64 float32, and float16 float32 where other weights are
    no float16; `e_score_correction_bias` is float32 always. `keep_fp8` leaves FP8 weights as they are, with their
    scales, for inference (experts if 128 divides moe_intermediate_size, and where all that is read together is FP8).
    MTP modules that the config promises but the folder lacks are left out with a warning. `allow_links` follows links
    out of the folder.

    Raises:
        CheckpointError: the checkpoint is broken or not supported, or larger than the device's memory; one line names
            the file or tensor.
    """
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    wanted = _DTYPES[dtype] if isinstance(dtype, str) else dtype
    folder = resolve(path, allow_links)
    model, tensors = open_checkpoint(folder)
    config = model.config
    state: dict[str, Tensor] = {}
    stored = {
        name: [tensors[part.name] for part in hf_parts(name, meta, config.num_hidden_layers)]
        for name, meta in model.state_dict().items()
    }
    kept = _kept(model, stored) if keep_fp8 else set()
    exact = bool(kept) or any(
        part.dtype not in (torch.float16, blocks.FP8) for name, parts in stored.items() for part in parts
        if not name.endswith(_BIAS)
    )  # fmt: skip
    kinds: dict[str, torch.dtype] = {}
    for name in stored:
        together = [part for other in ({name} | _read_with(name)) & stored.keys() for part in stored[other]]
        kinds[name] = _dtype(name, together, wanted, exact)
    for name in kept:
        _quantize(model, name)
    metas = {name: (meta, kinds.get(name, meta.dtype)) for name, meta in model.state_dict().items()}
    _check_memory(folder, sum(meta.numel() * kind.itemsize for meta, kind in metas.values()), device)
    for name, (meta, kind) in metas.items():
        state[name] = _fill(empty(meta.shape, kind, device), name, tensors, config)
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.rotary.to(device)
    return model


def load_pieces(folder: Path, pieces: Iterable[Piece]) -> None:
    """Fill pieces of the network's state dict from a folder, whatever its layout: only their values are read, of FP8
    blocks the matrices that they are in.

    Raises:
        CheckpointError: as `load`; or the folder's network has no such tensor.
    """
    model, tensors = open_checkpoint(folder)
    whole = model.state_dict()
    for piece in pieces:
        if piece.name not in whole or whole[piece.name].shape != piece.shape:
            found = list(whole[piece.name].shape) if piece.name in whole else "none"
            raise CheckpointError(f"{folder}: {piece.name} is to have shape {list(piece.shape)}, there is {found}")
        out = piece.tensor.detach().view(-1)
        start, stop = piece.start, piece.start + out.numel()
        at = 0  # each part is a range of ours, in this order
        for part in hf_parts(piece.name, whole[piece.name], model.config.num_hidden_layers):
            stored = tensors[part.name]
            first, last = max(start, at), min(stop, at + math.prod(stored.shape))
            if first < last:
                _fill_range(out[first - start : last - start], first - at, part.name, tensors)
            at += math.prod(stored.shape)


def _fill_range(out: Tensor, start: int, name: str, tensors: Mapping[str, Stored]) -> None:
    """Fill flat `out` with the values of a stored tensor from `start` on."""
    stored, stop = tensors[name], start + out.numel()
    if stored.dtype == blocks.FP8:
        whole = ops.dequantize_blocks(stored.read(), tensors[name + blocks.SCALE].read(), torch.float32)
        out.copy_(whole.view(-1)[start:stop])
    else:
        stored.flat(start, stop).copy_to(out)


def _layer(name: str) -> int:
    """The block a published tensor belongs to, -1 for none."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


_PLACE = re.compile(r"model\.layers\.(\d{1,9})\.(?:mlp\.experts\.(\d{1,9})\.|(enorm|hnorm|eh_proj|shared_head)\.)?")


def _check_sizes(config: ModelConfig, tensors: Mapping[str, Stored]) -> None:
    """The folder has as many layers and experts as the config says: before a network of the config's size is built."""
    experts: dict[int, int] = {}  # of each layer
    mtp: set[int] = set()
    for name in tensors:
        if found := _PLACE.match(name):
            layer = int(found[1])
            experts[layer] = max(experts.get(layer, 0), int(found[2] or -1) + 1)
            if found[3]:
                mtp.add(layer)
    layers, asked = experts.keys() - mtp, config.num_hidden_layers
    if len(layers) != asked or max(layers, default=-1) != asked - 1 or any(layer < asked for layer in mtp):
        plain = f"{len(layers)} layers, the last {max(layers)}," if layers else "no layers"
        raise CheckpointError(
            f"config.json says num_hidden_layers = {asked}, but the weights hold {plain} beside MTP's"
        )
    for layer, count in sorted(experts.items()):
        if layer < asked + config.num_nextn_predict_layers:
            want = config.n_routed_experts if config.is_moe_layer(layer) else 0
            if count != want:
                what = f"n_routed_experts = {want}" if want else "that it has none"
                raise CheckpointError(
                    f"layer {layer} has {count} routed experts in the weights; config.json says {what}"
                )


def _check_memory(folder: Path, need: int, device: torch.device | str) -> None:
    if need > (have := memory(device)):
        raise CheckpointError(
            f"{folder}: its weights take {need / 2**30:,.1f} GiB here, but this process may have "
            f"{have / 2**30:,.1f} GiB of memory on {torch.device(device).type}; take a larger machine, or a "
            "smaller dtype (FP8: `leanseek convert --to fp8`)"
        )


def _check(model: Transformer, tensors: Mapping[str, Stored]) -> None:
    """All tensors of the model are there with its shapes, and no others."""
    layers = model.config.num_hidden_layers
    expected = {
        part.name: tuple(meta[part.place].shape)
        for name, meta in model.state_dict().items()
        for part in hf_parts(name, meta, layers)
    }
    if missing := [name for name in expected if name not in tensors]:
        raise CheckpointError(f"tensor {missing[0]} is missing{_and_more(missing)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(f"{name} has shape {list(tensors[name].shape)}, the config asks for {list(shape)}")
    unexpected = [
        name for name in tensors if name.removesuffix(blocks.SCALE) not in expected and not _ignored(name, model.config)
    ]
    if unexpected:
        raise CheckpointError(f"tensor {unexpected[0]} does not belong to this network{_and_more(unexpected)}")
    blocks.check_blocks(tensors)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that folders carry and the network does not need."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
        return True
    depth = _layer(name) - config.num_hidden_layers
    if depth >= config.num_nextn_predict_layers:
        return True  # MTP modules that the config does not count
    return depth >= 0 and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))  # copies


def _kept(model: Transformer, stored: Mapping[str, list[Stored]]) -> set[str]:
    """Weights that can stay FP8. Those that one product reads together stay together, or none of them does."""
    able = {
        name
        for name, parts in stored.items()
        if all(part.dtype == blocks.FP8 for part in parts) and _multiplies(_module(model, name))
    }
    return {name for name in able if able.issuperset(_read_with(name) & stored.keys())}


def _read_with(name: str) -> set[str]:
    """The weights that a product takes together with `name`, all in one dtype."""
    for one, other in (("gate_proj.weight", "up_proj.weight"), ("experts.gate_up_proj", "experts.down_proj")):
        for this, that in ((one, other), (other, one)):
            if name.endswith("." + this):
                return {name.removesuffix(this) + that}
    return set()


def _module(model: Transformer, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _multiplies(module: nn.Module) -> bool:
    """Whether a module computes with FP8 blocks, of which none may lie across an expert's gate and up."""
    if isinstance(module, Experts):
        return module.down_proj.shape[2] % blocks.BLOCK == 0
    return isinstance(module, Linear)


def _quantize(model: Transformer, name: str) -> None:
    """Give a weight, still on meta, the form of FP8 blocks."""
    shape, device = model.get_parameter(name).shape, torch.device("meta")
    data = torch.empty(shape, dtype=blocks.FP8, device=device)
    scale = torch.empty(ops.FP8_BLOCKS.scale_shape(shape), device=device)
    replace_weight(_module(model, name), name.rpartition(".")[2], ops.QuantizedWeight(data, scale, ops.FP8_BLOCKS))


_BIAS = "e_score_correction_bias"


def _dtype(name: str, parts: list[Stored], wanted: torch.dtype | None, exact: bool) -> torch.dtype:
    """The dtype of a tensor in memory: it holds all `parts` that a product reads together.

    float64 becomes float32, and so does float16 (`exact`) beside weights of another dtype: no kernel takes such pairs.
    """
    if name.endswith(_BIAS):
        return torch.float32
    if wanted is not None:
        return wanted
    found = {torch.bfloat16 if part.dtype == blocks.FP8 else part.dtype for part in parts}
    kind = functools.reduce(torch.promote_types, found)
    return torch.float32 if kind == torch.float64 or (exact and kind == torch.float16) else kind


def _fill(out: Tensor, name: str, tensors: Mapping[str, Stored], config: ModelConfig) -> Tensor:
    """Read the parts of our tensor `name` into `out`, one at a time; FP8 is dequantised unless `out` is FP8."""
    for part in hf_parts(name, out, config.num_hidden_layers):
        stored, place = tensors[part.name], out[part.place]
        if stored.dtype == blocks.FP8 and out.dtype != blocks.FP8:
            scale = tensors[part.name + blocks.SCALE].read()
            place.copy_(ops.dequantize_blocks(stored.read(), scale, out.dtype))
        else:
            stored.copy_to(place)
    return out


# ---- out ----


def save(
    model: Transformer,
    path: str | Path,
    format: str = "hf",
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    beside: str | Path | None = None,
    allow_links: bool = False,
    allow_nonfinite: bool = False,
) -> list[str]:
    """A folder that transformers and vLLM load with nothing missing and nothing unexpected.

    "hf" keeps the model's dtypes (kept FP8 becomes BF16); "hf-fp8" writes 128×128 FP8 blocks and BF16, as published.
    Tensors are made and written one at a time; the folder appears whole or not at all. `beside` is the model folder
    whose other files go along (generation_config.json, templates, licence); returned is a line for each left out.

    Raises:
        ConfigError: no Hugging Face class computes this network (a baseline).
        CheckpointError: `path` exists and is not empty or cannot be written, `tokenizer_from` has no tokenizer, a
            link leaves it (unless `allow_links`), or a weight is NaN or infinity (unless `allow_nonfinite`).
        RunError: the disk is full.
    """
    config = model.config
    if reason := unsupported_by_hf(config):
        raise ConfigError(f"no Hugging Face class computes this network: {reason}")
    census = Census()
    source = {name: census.watched(lazy) for name, lazy in _lazies(model).items()}
    if format == "hf":
        tensors = list(blocks.dequantized(source))
    elif format == "hf-fp8":
        tensors = list(blocks.as_fp8(source))
    else:
        raise CheckpointError(f"format {format!r} is not one of hf, hf-fp8")
    tensors += _mtp_copies({lazy.name: lazy for lazy in tensors}, config)
    with atomic_folder(Path(path)) as folder:
        write_json(folder / "config.json", config.to_hf() | described(tensors))
        left = copy_beside(Path(beside), folder, allow_links) if beside is not None else []
        if not (folder / "generation_config.json").is_file():
            write_json(folder / "generation_config.json", _generation_config(config))
        if tokenizer_from is not None:
            copy_tokenizer(Path(tokenizer_from), folder, config, allow_links)
        write_weights(folder, tensors, config, max_shard_bytes)
        census.judge(allow_nonfinite)
    return left


def write_model(model: Transformer, folder: Path) -> None:
    """The model's part of a training checkpoint, into an existing folder: `config.json` and one `model.safetensors`.

    Weights are as they are in memory. A baseline that Hugging Face cannot describe has its config in our own form.
    """
    tensors = list(_lazies(model).values())
    write_config(model.config, described(tensors), folder)
    write_file(folder / SINGLE, tensors)


def write_config(config: ModelConfig, about: dict[str, Any], folder: Path) -> None:
    """What a training checkpoint says of its network, and `about` its weights: config.json, generation_config.json."""
    if unsupported_by_hf(config):
        values: dict[str, Any] = {"model_type": "leanseek", OWN_CONFIG: config.to_dict()}
    else:
        values = config.to_hf()
    write_json(folder / "config.json", values | about)
    write_json(folder / "generation_config.json", _generation_config(config))


def write_weights(folder: Path, tensors: Iterable[Lazy], config: ModelConfig, max_shard_bytes: int) -> None:
    """The safetensors of a published folder, MTP modules being layers after the last.

    transformers passes over such a layer only at index 61. In any other network the MTP layers go to a file of their
    own, outside of the index: its loader does not open that file, ours and vLLM's (unless there are shards) do.
    """
    apart = config.num_hidden_layers != 61 or config.model_type == "deepseek_v2"
    main: list[Lazy] = []
    mtp: list[Lazy] = []
    for lazy in tensors:
        (mtp if apart and _layer(lazy.name) >= config.num_hidden_layers else main).append(lazy)
    write_shards(folder, main, max_shard_bytes)
    if mtp:
        write_file(folder / MTP_FILE, mtp)


def described(tensors: Iterable[Lazy]) -> dict[str, Any]:
    """What config.json says about the weights: their dtype and their quantisation."""
    dtypes = {lazy.name: lazy.dtype for lazy in tensors}
    quantized = {"quantization_config": blocks.QUANTIZATION_CONFIG} if blocks.FP8 in dtypes.values() else {}
    return dtype_keys(dtypes["model.embed_tokens.weight"]) | quantized


def dtype_keys(dtype: torch.dtype) -> dict[str, Any]:
    """The dtype of the weights under its old and its new key."""
    name = str(dtype).removeprefix("torch.")
    return {"torch_dtype": name, "dtype": name}


def unsupported_by_hf(config: ModelConfig) -> str | None:
    """Why transformers' deepseek_v3 or deepseek_v2 class would compute something else, or None."""
    c, v2 = config, config.model_type == "deepseek_v2"
    if c.attention != "mla":
        return f"attention = {c.attention!r}"
    if v2 and not c.rope_interleave:
        return "deepseek_v2 with rope_interleave = false"
    if not c.n_routed_experts:
        return None
    if c.moe_layer_freq != 1:
        return f"moe_layer_freq = {c.moe_layer_freq}"
    if not c.n_shared_experts:
        return "routed experts without a shared one"
    if v2 and (c.scoring_func != "softmax" or c.selection_bias or c.norm_topk_prob):
        return "deepseek_v2 has softmax scores, greedy choice and no normalisation of the gate"
    if not v2 and (c.scoring_func != "sigmoid" or not c.selection_bias):
        return "deepseek_v3 has sigmoid scores and the selection bias (topk_method = noaux_tc)"
    return None


def _lazies(model: Transformer) -> dict[str, Lazy]:
    return {
        name: Lazy(name, tensor.dtype, tuple(tensor.shape), functools.partial(_itself, tensor))
        for name, tensor in iter_hf_tensors(model)
    }


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _mtp_copies(tensors: Mapping[str, Lazy], config: ModelConfig) -> list[Lazy]:
    """Embedding and head once more under each MTP layer, where published checkpoints have them."""
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    first = config.num_hidden_layers
    return [
        lazy._replace(name=f"model.layers.{layer}.{name}.weight")
        for layer in range(first, first + config.num_nextn_predict_layers)
        for name, lazy in (("embed_tokens", embedding), ("shared_head.head", head))
    ]


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    eos = list(config.eos_token_ids)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None)}
    return {"_from_model_config": True, **ids}
