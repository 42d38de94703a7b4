"""The packed copy: what is mapped from it serves as what was packed, and it never outlives its checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leanseek import Transformer, checkpoint
from leanseek.backends import packed_copy as packed
from leanseek.cli.generate import finish_copy
from leanseek.engine import LLM, SamplingParams
from leanseek.machine.numa import memory_nodes
from leanseek.native import panels

pytestmark = pytest.mark.skipif(
    bool(panels.refusal()) or len(memory_nodes()) > 1,
    reason="weights are packed for native kernels, and copied where memory has one node",
)
WIDE = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "kv_lora_rank": 128}
PROMPTS = [[5, 6, 7], [9] * 40]


@pytest.fixture
def save(
    tmp_path: Path, make_model: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """save(fp8=False, **config changes): the folder of a model that is worth a copy."""
    monkeypatch.setattr(packed, "LEAST", 0)

    def write(fp8: bool = False, **changes: Any) -> Path:
        folder, model = tmp_path / "model", make_model(**changes)
        if fp8:
            checkpoint.save(model, folder, "hf-fp8")
        else:
            folder.mkdir()
            checkpoint.write_model(model, folder)
        return folder

    return write


def start(folder: Path, **options: Any) -> list[Any]:
    """What a start says, tokens and their log-probabilities to the bit; its copy, if it writes one, is whole then."""
    model = LLM(folder, cache_gib=0.001, **options)
    if model.engine.copying:
        model.engine.copying.join()
    outputs = model.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0, logprobs=1))
    return [(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in outputs]


def copies(folder: Path) -> list[Path]:
    return sorted((folder / packed.FOLDER).glob("packed-*"))


@pytest.mark.parametrize(
    ("fp8", "changes", "options"),
    [
        (False, {}, {}),
        (False, {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}, {}),
        (False, {}, {"dtype": "float32"}),
        (True, WIDE, {"int8_head": True, "speculate": 1}),
        (True, WIDE | {"tie_word_embeddings": True}, {"int8_head": True}),
    ],
)
def test_a_second_start_maps_and_says_the_same(
    save: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    fp8: bool,
    changes: dict[str, Any],
    options: dict[str, Any],
) -> None:
    folder = save(fp8, **changes)
    said = start(folder, **options)
    assert len(copies(folder)) == 1
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("the checkpoint was read"))
    assert start(folder, **options) == said


@pytest.mark.parametrize("name", [b"m\xf6del", "\u7687".encode("gb18030")])
def test_a_folder_whose_name_is_not_utf_8(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    folder = save()
    folder = folder.rename(folder.with_name(os.fsdecode(name)))
    said = start(folder)
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("the checkpoint was read"))
    assert start(folder) == said


def test_a_short_process_waits_until_its_copy_is_whole(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each `generate` would begin one in vain."""
    folder, write = save(), packed.write_file

    def slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        write(*arguments)

    monkeypatch.setattr(packed, "write_file", slowly)
    engine = LLM(folder, cache_gib=0.001).engine
    assert not copies(folder)
    finish_copy(engine)
    assert len(copies(folder)) == 1


def test_a_mapped_weight_begins_at_a_cache_line(save: Callable[..., Path]) -> None:
    folder = save()
    start(folder)
    found = packed.PackedCopy(folder, "auto", False).read()
    assert found is not None
    assert all(w.data.data_ptr() % 64 == 0 for w in found[1].values() if w.data.nbytes % 64 == 0)


def test_another_checkpoint_gets_another_copy(
    save: Callable[..., Path], make_model: Callable[..., Transformer]
) -> None:
    """Of the same shapes, size and modification time; the old copy goes."""
    folder = save()
    said = start(folder)
    (old,) = copies(folder)
    weights = folder / "model.safetensors"
    before = weights.stat()
    (folder.parent / "other").mkdir()
    checkpoint.write_model(make_model(seed=1), folder.parent / "other")
    weights.write_bytes((folder.parent / "other" / "model.safetensors").read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    other = start(folder)
    assert other != said
    (new,) = copies(folder)
    assert new != old
    assert start(folder) == other


def test_options_have_copies_of_their_own(save: Callable[..., Path]) -> None:
    folder = save()
    start(folder)
    start(folder, dtype="float32")
    assert len(copies(folder)) == 2
    start(folder, packed_copy=False)
    assert len(copies(folder)) == 2


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_broken_copy_is_made_anew(save: Callable[..., Path], keep: float) -> None:
    folder = save()
    said = start(folder)
    (copy,) = copies(folder)
    content = copy.read_bytes()
    copy.write_bytes(
        content[: int(keep * len(content))] if keep < 1 else content.replace(b"embed_tokens", b"embed_tokenz")
    )
    assert start(folder) == said
    assert copy.read_bytes() == content


def test_no_copy_through_a_link_nor_on_a_full_disk(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / packed.FOLDER).symlink_to(elsewhere)
    start(folder)
    assert not list(elsewhere.iterdir())
    (folder / packed.FOLDER).unlink()
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: usage)
    start(folder)
    assert not copies(folder)


@pytest.mark.parametrize("left", ["partial", "packed-0123456789abcdef-auto.safetensors"])
def test_what_a_killed_write_or_another_checkpoint_left_does_not_block_a_copy(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """There is room for a copy only once it is gone."""
    folder = save()
    (folder / packed.FOLDER).mkdir()
    stale = folder / packed.FOLDER / left
    stale.write_bytes(b"half of one")
    monkeypatch.setattr(
        packed.shutil, "disk_usage", lambda _: type("usage", (), {"free": 0 if stale.exists() else 1e12})
    )
    start(folder)
    assert len(copies(folder)) == 1
    assert not stale.exists()


def test_a_write_that_fails_leaves_nothing(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save()

    def half(path: Path, *_: object) -> None:
        path.write_bytes(bytes(1000))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "write_file", half)
    start(folder)
    assert [p.name for p in (folder / packed.FOLDER).iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_serves_all_the_same(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packed, "write_file", refuse)
    said = start(folder)
    assert len(said) == 2 and not copies(folder)


def test_a_network_that_is_not_packed_has_none(save: Callable[..., Path]) -> None:
    folder = save(attention="gqa", num_key_value_heads=2, num_nextn_predict_layers=0)
    said = start(folder)
    assert not (folder / packed.FOLDER).exists()
    assert start(folder) == said


def test_small_models_have_none(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save()
    monkeypatch.setattr(packed, "LEAST", 2**28)
    start(folder)
    assert not (folder / packed.FOLDER).exists()
