"""leanseek info: what a network costs, without allocating it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from leanseek.cli.generate import AllowLinks
from leanseek.config import ConfigError, ModelConfig, merged, with_presets
from leanseek.reading import read_toml, shorten


def find_config(name: str, allow_links: bool = False) -> ModelConfig:
    """The network of a preset, a TOML file, a Hugging Face folder or a run. Raises InputError for anything else."""
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        table = merged(with_presets(read_toml(path, ConfigError)))
        if not isinstance(model := table.get("model", {}), dict):
            raise ConfigError(f"{path}: model = {shorten(repr(model))} is not a table")
        return ModelConfig.from_dict(model)
    if path.is_dir():
        from leanseek.checkpoint import read_config, resolve

        return read_config(resolve(path, allow_links))
    return ModelConfig.preset(name)


def describe(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """The figures of `leanseek info`."""
    from leanseek import planning

    return {
        "parameters": planning.parameters(config),
        "activated_parameters": planning.activated_parameters(config),
        "mtp_parameters": planning.parameters(config, mtp=True) - planning.parameters(config),
        "kv_bytes_per_token": planning.kv_bytes_per_token(config),
        "kv_bytes_per_token_as_mha": planning.kv_bytes_per_token_as(config, config.num_attention_heads),
        "train_flops_per_token": planning.train_flops_per_token(config, seq_len),
        "train_flops_seq_len": seq_len,
        "training_memory_bytes": planning.training_memory(config),
    }


def info(
    model: Annotated[
        str, typer.Argument(metavar="PRESET_OR_MODEL", help="preset, TOML file, checkpoint folder or run")
    ],
    seq_len: Annotated[int, typer.Option(help="sequence length for the training FLOPs")] = 4096,
    allow_links: AllowLinks = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Parameters, cache and training cost of a network, without allocating it."""
    config = find_config(model, allow_links)
    figures = describe(config, seq_len)
    if as_json:
        print(json.dumps(figures))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    share = figures["kv_bytes_per_token"] / figures["kv_bytes_per_token_as_mha"]
    rows = {
        "parameters": f"{figures['parameters'] / 1e9:,.2f} B",
        "activated per token": f"{figures['activated_parameters'] / 1e9:,.2f} B",
        "MTP modules": f"{figures['mtp_parameters'] / 1e9:,.2f} B",
        "KV cache per token, BF16": f"{figures['kv_bytes_per_token']:,} bytes ({share:.1%} of MHA's)",
        f"training FLOPs per token at {seq_len:,}": f"{figures['train_flops_per_token'] / 1e9:,.3f} G",
        "weights, gradients, AdamW in FP32": f"{figures['training_memory_bytes'] / 2**30:,.1f} GiB",
    }
    table = Table(title=Text(shorten(model, 200)), show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
