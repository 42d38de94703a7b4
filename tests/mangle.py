"""Mangle every file of a model, a corpus and a run, key by key; each input is one line of complaint or a right result.

    python tests/mangle.py --seed 7 --count 5000

Each input runs in a child process of its own with a GiB of memory beyond what it began with and ten seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tomli_w
from safetensors.torch import save_file

from leanseek import checkpoint
from leanseek.checkpoint.files import open_file
from leanseek.checkpoint.hf import load_pieces
from leanseek.checkpoint.pieces import pieces_of
from leanseek.checkpoint.training import checksum, crc32, read_checkpoint
from leanseek.checkpoint.writer import Writer
from leanseek.cli.info import describe, find_config
from leanseek.config import ModelConfig
from leanseek.data.loader import TokenDataset
from leanseek.data.prepare import prepare
from leanseek.engine import LLM, SamplingParams
from leanseek.errors import InputError, RunError
from leanseek.model import Transformer
from leanseek.server.templates import load_chat_template
from leanseek.training.config import RunConfig
from leanseek.training.metrics import read_rows

SECONDS, MEMORY = 10, 2**30
MISSING = object()
DEEP = "@deep@"  # 100,000 brackets, put in as text
VALUES: tuple[Any, ...] = (
    MISSING, None, True, False, -1, 0, 1, 7, 10**9, 10**18, 10**400, 0.5, -2.5, float("nan"), float("inf"), "", "false",
    "x" * 100_000, "\ud800", "../x", [], [1], [None], ["a", 1], {}, {"a": {"b": 1}}, DEEP,
)  # fmt: skip

MODEL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 64,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


def build(root: Path) -> None:
    """A corpus, a model with every file beside it, in shards and whole, and a run with a checkpoint."""
    import torch

    (root / "text").mkdir()
    for i in range(40):
        (root / f"text/{i}.txt").write_text(f"to be or not to be, {i} " * 20, encoding="utf-8")
    prepare([root / "text"], root / "shards", train_vocab=300, workers=1, validation_fraction=0.2)
    model = Transformer(ModelConfig.from_dict(MODEL)).init_weights(0)
    tokenizer = json.loads((root / "shards/tokenizer_config.json").read_text(encoding="utf-8"))
    for name, size in (("whole", 10**9), ("sharded", 40_000)):
        checkpoint.save(model, root / name, tokenizer_from=root / "shards", max_shard_bytes=size)
        config = tokenizer | {
            "add_bos_token": True,
            "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        }
        write(root / name / "tokenizer_config.json", config)
        special = {key: tokenizer[key] for key in ("bos_token", "eos_token") if tokenizer.get(key)}
        write(root / name / "special_tokens_map.json", special)
        (root / name / "chat_template.jinja").write_text("{{ messages[0].content }}é", encoding="utf-8")
        generation = {"eos_token_id": [1, 2], "bos_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
        more = {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 4}
        write(root / name / "generation_config.json", generation | more)
    checkpoint.save(model, root / "fp8", "hf-fp8", tokenizer_from=root / "shards")
    tables = {
        "name": "x",
        "model": MODEL,
        "data": {"path": str(root / "shards"), "seq_len": 16},
        "train": {"steps": 2, "device": "cpu"},
        "optimizer": {"ema": 0.9},
        "checkpoint": {"every": 1},
    }
    (root / "run.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    run = root / "runs/x"
    state = {"samples": 4, "tokens": 64, "skipped": 0, "config": tomli_w.dumps(tables), "without_moments": []}
    state |= {"data": [1, 2], "guard": {"losses": [1.0, 2.0], "in_a_row": 0}}
    tensors = {"exp_avg.a": torch.zeros(3), "step.a": torch.zeros(())}
    with Writer(run, 9) as writer:
        pieces = pieces_of(model.state_dict()), pieces_of(tensors)
        writer.save(1, model.config, *pieces, state, root / "shards")
        writer.save(2, model.config, *pieces, state, root / "shards")
    sharded(run / "checkpoints/step-2")
    rows = [{"step": i, "loss": 1.0, "load": [[1, 2]], "event": "x"} for i in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sharded(folder: Path) -> None:
    """Make the files of a checkpoint those that two ranks write."""
    import torch

    stored = open_file(folder / "model.safetensors")
    names, weights = [*stored], {}
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: stored[name].read() for name in some}, folder / file, {"format": "pt"})
        weights |= dict.fromkeys(some, file)
    write(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weights})
    halves = {"exp_avg.a": (0, 5), "step.a": (0, 1)}, {"exp_avg.a": (5, 7)}
    for number, held in enumerate(halves, start=1):
        places = {name: {"start": start, "shape": [3, 4]} for name, (start, _) in held.items() if name != "step.a"}
        tensors = {name: torch.ones(() if name == "step.a" else (size,)) for name, (_, size) in held.items()}
        save_file(tensors, folder / f"state-{number:05}-of-00002.safetensors", {"pieces": json.dumps(places)})
    for name in ("model.safetensors", "state.safetensors"):
        (folder / name).unlink()
    state = json.loads((folder / "state.json").read_bytes())
    write(folder / "state.json", state | {"files": {}})
    for path in folder.iterdir():
        if path.name != "state.json":
            sign(path)


# ---- what opens them ----


def serve(folder: Path) -> None:
    llm = LLM(folder, packed_copy=False, cache_gib=0.01)
    llm.generate("to be" if llm.tokenizer else [[3, 4]], SamplingParams(temperature=0.0, max_tokens=1))
    load_chat_template(folder).close()


def info(path: Path) -> None:
    json.dumps(describe(find_config(str(path)), 4096), allow_nan=False)


def resume(run: Path) -> None:
    read_checkpoint(run / "checkpoints/step-1")


def resume_ranks(run: Path) -> None:
    """As one of two ranks that hold other parts than those that wrote it."""
    folder = run / "checkpoints/step-2"
    model = Transformer(ModelConfig.from_dict(MODEL))
    pieces = pieces_of(model.state_dict())
    load_pieces(folder, [p._replace(start=7, tensor=p.tensor.view(-1)[7:]) for p in pieces])
    stored = read_checkpoint(folder).tensors
    if sorted(stored) == ["exp_avg.a", "step.a"] and stored["exp_avg.a"].shape == (3, 4):
        assert stored["exp_avg.a"].read(3, 9).shape == (6,)


def dataset(folder: Path) -> None:
    data = TokenDataset(folder, "train", 16)
    assert int(data.batch(0, 2).tokens.max()) < len(data.token_bytes)


def settings(folder: Path) -> None:
    prepare([folder.parent / "text"], folder, train_vocab=300, workers=1, validation_fraction=0.2)


def row_file(run: Path) -> None:
    read_rows(run / "metrics.jsonl")


def toml(path: Path) -> None:
    RunConfig.load(str(path), [])


# folder, file in it ("" for the folder itself being the file), what opens it, and what is given to that
TARGETS: tuple[tuple[str, str, Callable[[Path], None]], ...] = (
    *(("whole", name, serve) for name in ("config.json", "generation_config.json", "tokenizer_config.json",
      "special_tokens_map.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "mtp.safetensors")),
    ("whole", "config.json", info), ("sharded", "model.safetensors.index.json", serve), ("fp8", "config.json", serve),
    ("fp8", "model.safetensors", serve), ("shards", "manifest.json", dataset), ("shards", "token_bytes.npy", dataset),
    ("shards", "00000.train.ends", dataset), ("shards", "00000.train.bin", dataset), ("shards", "tokenizer.json", dataset),
    ("shards", "tokenizer_config.json", dataset), ("shards", "settings.json", settings),
    ("runs/x", "checkpoints/step-1/state.json", resume), ("runs/x", "checkpoints/step-1/state.safetensors", resume),
    *(("runs/x", f"checkpoints/step-2/{name}", resume_ranks) for name in ("state.json", "model.safetensors.index.json",
      "state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors", "model-00001-of-00002.safetensors")),
    ("runs/x", "metrics.jsonl", row_file), ("run.toml", "", toml), ("run.toml", "", info),
)  # fmt: skip


# ---- how they are mangled ----


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places in a JSON value; of a large collection the first few."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:40]:
        yield from paths(inner, (*at, key))


def changed(value: Any, at: tuple[Any, ...], by: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if by is MISSING:
        del inner[at[-1]]
    elif by == "longer" and isinstance(inner[at[-1]], list):
        inner[at[-1]] = inner[at[-1]] * 2 or [0]
    else:
        inner[at[-1]] = by
    return value


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode().replace(json.dumps(DEEP).encode(), b"[" * 100_000 + b"]" * 100_000)


def write(path: Path, value: Any) -> None:
    path.write_bytes(encoded(value))


def sign(path: Path) -> None:
    """Give a mangled file of a checkpoint the checksum in its state.json."""
    state = json.loads((path.parent / "state.json").read_bytes())
    if path.is_file():
        state["files"][path.name] = [path.stat().st_size, crc32(path)]
    state.pop("checksum")
    write(path.parent / "state.json", state | {"checksum": checksum(state)})


def raw(content: bytes, rng: random.Random) -> bytes:
    """Bytes cut off, added, doubled, zeroed or flipped."""
    at = rng.randrange(len(content) + 1)
    ways = (
        content[:at], b"", content + bytes(9), content + content, content[:at] + bytes(8) + content[at + 8 :],
        content[:at] + rng.randbytes(4) + content[at + 4 :], content.replace(b":", b"::", 1), b"[" * 100_000,
        b'{"a":' * 100_000, b"\xff\xfe" + content, b'{"a": 1, "a": 2}', struct.pack("<Q", 2**40) + content[8:],
    )  # fmt: skip
    return rng.choice(ways)


def mangle(path: Path, rng: random.Random) -> str:
    """Change the file; returns what was done."""
    content = path.read_bytes()
    if rng.random() < 0.15 or path.suffix in (".npy", ".bin", ".ends", ".jinja"):
        if rng.random() < 0.1:
            path.unlink()
            os.mkfifo(path)
            return "a pipe"
        if path.suffix == ".npy" and rng.random() < 0.5:
            kind = rng.choice(["O", "f8", "i8", "u1", "U4", "?", "c16", "M8[s]", "V8"])
            with contextlib.suppress(TypeError, ValueError):
                shape = rng.choice([(), (0,), (3, 4), (300,), (2**25,)])
                np.save(path, np.zeros(shape, kind), allow_pickle=kind == "O")
            return f"an array of {kind}"
        path.write_bytes(raw(content, rng))
        return "bytes"
    body, head = content, 0
    if path.suffix == ".safetensors":
        head = struct.unpack("<Q", content[:8])[0]
        body = content[8 : 8 + head]
    if path.suffix == ".toml":
        value = tomllib.loads(body.decode())
    elif path.suffix == ".jsonl":
        value = [json.loads(line) for line in body.splitlines()]
    else:
        value = json.loads(body)
    places = value.get("__metadata__", {}).get("pieces") if head else None  # JSON in a text of the header
    inside = places is not None and rng.random() < 0.5
    target = json.loads(places) if inside else value
    at, by = rng.choice(list(paths(target))), rng.choice((*VALUES, "longer"))
    target = changed(target, at, by)
    if inside:
        value["__metadata__"]["pieces"] = encoded(target).decode()
    else:
        value = target
    if path.suffix == ".toml":
        try:
            text = tomli_w.dumps(value).encode().replace(json.dumps(DEEP).encode(), b"[" * 100_000)
        except (TypeError, ValueError, RecursionError):
            text = body + b"\nx = " + b"[" * 5000
        path.write_bytes(text)
    elif path.suffix == ".jsonl":
        path.write_bytes(b"".join(encoded(row) + b"\n" for row in value))
    elif head:
        text = encoded(value)
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + head :])
    else:
        if path.name == "state.json" and isinstance(value, dict) and at[0] != "checksum":
            value.pop("checksum", None)
            with contextlib.suppress(ValueError):
                value["checksum"] = checksum(value)
        path.write_bytes(encoded(value))
    shown = "missing" if by is MISSING else repr(by)[:40]
    return f"{'.'.join(map(str, at))} = {shown}"


# ---- one input ----


def judge(opener: Callable[[Path], None], path: Path) -> str:
    """What is wrong with how an input was taken; "" if nothing is. Runs in a child of its own."""
    read, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        with open(read, "rb") as answer:
            said = answer.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return f"longer than {SECONDS} s" if number == signal.SIGALRM else f"killed by signal {number}"
        return said
    try:
        os.close(read)
        signal.alarm(SECONDS)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        said = _said(opener, path)
        os.write(write_end, said.encode(errors="replace")[:3000])
    finally:
        os._exit(0)


def _said(opener: Callable[[Path], None], path: Path) -> str:
    try:
        with open(os.devnull, "w", encoding="utf-8") as null, contextlib.redirect_stderr(null):
            warnings.simplefilter("ignore")
            opener(path)
    except (InputError, RunError) as error:
        text = str(error)
        return (
            ""
            if text and "\n" not in text and len(text) < 1500 and text.isprintable()
            else f"not a line: {text[:300]!r}"
        )
    except BaseException:
        return traceback.format_exc()[-1500:]
    return ""


def inputs(root: Path, seed: int, count: int) -> Iterator[tuple[str, str]]:
    """(what was done, what was wrong) of `count` inputs; every target in turn."""
    rng = random.Random(seed)
    for number in range(count):
        folder, name, opener = TARGETS[number % len(TARGETS)]
        with tempfile.TemporaryDirectory() as place:
            whole = Path(place) / folder
            whole.parent.mkdir(parents=True, exist_ok=True)
            if name:
                shutil.copytree(root / folder, whole, symlinks=True)
            else:
                shutil.copy(root / folder, whole)
            if opener is settings:
                (Path(place) / "text").symlink_to(root / "text")
            done = mangle(whole / name if name else whole, rng)
            if name.startswith("checkpoints/") and not name.endswith("/state.json"):
                sign(whole / name)
            yield f"{folder}/{name} by {opener.__name__}: {done}", judge(opener, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        build(Path(place))
        for what, said in inputs(Path(place), given.seed, given.count):
            if said:
                wrong += 1
                print(f"--- {what}\n{said}", flush=True)
    print(f"{given.count - wrong} of {given.count} inputs were clean")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
