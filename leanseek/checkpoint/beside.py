"""Copies the files beside the weights of a model folder: tokenizer, templates, code, licence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from leanseek.reading import leaves

_FOLDERS = ("additional_chat_templates",)  # read by transformers; other folders are not part of the model
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin.index.json", ".gguf", ".h5", ".msgpack", ".onnx")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OURS = ("config.json", "state.json")  # we write the first ourselves; the second belongs to a training checkpoint


def copy_beside(source: Path, out: Path, allow_links: bool = False) -> list[str]:
    """Copy everything but weights and config.json from the model folder `source`; returns a line per skipped file.

    Links out of the folder are skipped unless `allow_links`. Code (*.py) is copied but never run, so that an `auto_map`
    still finds it.
    """
    left = []
    for path, reason in _beside(source, allow_links):
        name = path.relative_to(source)
        if reason:
            left.append(f"{name} ({reason})")
            continue
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, out / name)
    return left


def _beside(source: Path, allow_links: bool) -> Iterator[tuple[Path, str]]:
    """Files, each with the reason not to copy it ("": copy it)."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in _OURS or path.name.endswith(_WEIGHTS):
            continue
        if path.is_dir() and path.name in _FOLDERS:
            yield from ((inner, _reason(source, inner, allow_links)) for inner in sorted(path.iterdir()))
        else:
            yield path, _reason(source, path, allow_links)


def _reason(source: Path, path: Path, allow_links: bool) -> str:
    if path.is_dir():
        return "a folder"
    if path.name.endswith(_PICKLES):
        return "pickled"
    if not path.is_file():
        return "not a file"
    target = None if allow_links else leaves(path, source)
    return f"a link to {target}, which leaves the folder" if target else ""
