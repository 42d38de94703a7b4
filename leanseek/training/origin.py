"""What a run begins with: random weights, or those of a checkpoint (`from`), whose network it then takes over."""

from __future__ import annotations

from pathlib import Path

import torch

from leanseek.checkpoint import CheckpointError, find_tokenizer, open_checkpoint, read_config, resolve
from leanseek.checkpoint.files import read_json
from leanseek.checkpoint.hf import load_pieces
from leanseek.checkpoint.ranks import Ranks, failing_together
from leanseek.checkpoint.training import STATE, check
from leanseek.config import ConfigError, ModelConfig
from leanseek.model import Transformer
from leanseek.training.part import Part


def network_of(source: str) -> ModelConfig:
    """The network of a run, of a checkpoint of one or of a Hugging Face folder; of its weights only the sizes are read.

    Raises:
        ConfigError: there is no such checkpoint, or it is broken or not supported.
    """
    try:
        return open_checkpoint(resolve(source))[0].config
    except CheckpointError as error:
        raise ConfigError(f"from: {error}") from None


def check_change(source: str, before: ModelConfig, after: ModelConfig) -> None:
    """Check that a network may go on with the weights of another.

    RoPE, the window and routing may change, MTP modules may go, and the output head for a reward model's score. No
    other weight may change its shape, come or go.

    Raises:
        ConfigError: one would; the line names the setting.
    """
    shapes = [
        {name: value.shape for name, value in Transformer(config, "meta").state_dict().items()}
        for config in (before, after)
    ]
    had, has = shapes
    lost = [name for name in had.keys() - has.keys() if not name.startswith("mtp.")]
    if after.num_labels > before.num_labels:
        lost = [name for name in lost if name != "lm_head.weight"]
        del has["score.weight"]
    if not lost and has.items() <= had.items():
        return
    was, now = before.to_dict(), after.to_dict()
    key = next(key for key in now if was.get(key) != now[key] and key not in _SHAPELESS)
    raise ConfigError(
        f"model.{key} = {now[key]!r}, but {source} has {was.get(key)!r}, and its weights have those shapes; leave the "
        f"key away, or `from`"
    )


# what weights have no shape by
_SHAPELESS = (
    *("rope_theta", "rope_scaling", "rope_interleave", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
    *("bos_token_id", "eos_token_id", "model_type", "scoring_func", "norm_topk_prob", "routed_scaling_factor"),
    *("n_group", "topk_group", "num_experts_per_tok"),
)


def check_tokenizer(tokenizer: Path, of: Path, data: Path) -> None:
    """Check that the ids of a folder of data mean the same text in a tokenizer.json, which belongs to the weights in
    folder `of`.

    Raises:
        ConfigError: they do not.
    """
    if _tokens(tokenizer) != _tokens(data / "tokenizer.json"):
        raise ConfigError(f"{data} has another tokenizer than {of}: its ids mean other text there")


def _tokens(path: Path) -> list[object]:
    """The parts of a tokenizer.json that decide the ids of a text, in any file layout."""
    spec = read_json(path)
    return [spec.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")]


def first_model(source: str, seed: int, config: ModelConfig, part: Part) -> Transformer:
    """This part of the network before its first step: drawn from `seed`, or with the weights of `source`.

    Raises:
        ConfigError, CheckpointError: the checkpoint is gone, damaged or not supported, or a weight has another shape.
    """
    model = part.model(config)
    if not source:
        return model.init_weights(seed)
    ranks: Ranks = part.about("the reading of a checkpoint")
    with failing_together(ranks):
        folder = resolve(source)
        if (folder / STATE).is_file():  # a run's, which has checksums
            check(folder, ranks)
        pieces, new = part.pieces(model), config.num_labels > read_config(folder).num_labels
        load_pieces(folder, [piece for piece in pieces if not (new and piece.name == "score.weight")])
        if new:
            torch.nn.init.zeros_(model.get_parameter("score.weight"))  # all answers are equally good so far
    return model


def origin(source: str, data: Path) -> tuple[str, list[str]]:
    """Where the weights come from in words, for a run's first line ("" if they are random), and lines on what could not
    be checked.

    Raises:
        ConfigError, CheckpointError: there is no such checkpoint, or its tokenizer is another than `data`'s.
    """
    if not source:
        return "", []
    folder = resolve(source)
    if (found := find_tokenizer(folder)) is None:
        return f" with the weights of {folder}", [
            f"{folder} has no tokenizer.json, so that of {data} could not be compared with it"
        ]
    check_tokenizer(found / "tokenizer.json", folder, data)
    return f" with the weights of {folder}", []
