"""A checkpoint that several ranks write is the one that a single process writes, and any layout reads any other's."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from leanseek.checkpoint import CheckpointError, load, load_ema, save
from leanseek.checkpoint import writer as room
from leanseek.checkpoint.files import open_file
from leanseek.checkpoint.hf import load_pieces
from leanseek.checkpoint.pieces import Piece, pieces_of
from leanseek.checkpoint.ranks import Ranks
from leanseek.checkpoint.training import newest_checkpoint, open_state, read_checkpoint, steps_on_disk
from leanseek.checkpoint.writer import Writer
from leanseek.errors import InputError, RunError
from leanseek.model import Transformer

T = TypeVar("T")


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, told: list[Any]):
        self.rank, self.ranks, self.barrier, self.told = rank, len(told), barrier, told

    def gather(self, value: Any) -> list[Any]:
        assert threading.current_thread().name.startswith("rank"), "a thread that writes talks to other ranks"
        self.told[self.rank] = value if isinstance(value, Tensor) else json.dumps(value)
        self.barrier.wait(20)
        found = [json.loads(one) if isinstance(one, str) else one for one in self.told]
        self.barrier.wait(20)
        return found


def on_ranks(count: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `count` ranks; raises what the first of them raised."""
    barrier, told = threading.Barrier(count), [None] * count
    with ThreadPoolExecutor(count, "rank") as pool:
        return [f.result() for f in [pool.submit(work, Threads(rank, barrier, told)) for rank in range(count)]]


# ---- layouts: what each rank has of the tensors ----

Layout = Callable[[Mapping[str, Tensor]], list[list[Piece]]]


def piece(name: str, whole: Tensor, start: int, stop: int) -> Piece:
    return Piece(name, tuple(whole.shape), start, whole.reshape(-1)[start:stop].clone())


def cut(tensors: Mapping[str, Tensor], ends: Callable[[str, Tensor], list[int]]) -> list[list[Piece]]:
    """Rank r has the values before ends(tensor)[r] that no rank before it has."""
    found: list[list[Piece]] = []
    for name, whole in tensors.items():
        stops = ends(name, whole)
        found = found or [[] for _ in stops]
        for rank, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            found[rank].append(piece(name, whole, start, stop))
    return found


def placed(tensors: Mapping[str, Tensor], ranks: int, where: Callable[[str], int]) -> list[list[Piece]]:
    """Every tensor whole on one rank."""
    return [[p for p in pieces_of(tensors) if where(p.name) == rank] for rank in range(ranks)]


def pp(ranks: int) -> Layout:
    """Layers in turn; the embedding, the head and the MTP modules on rank 0, as in a V-shaped pipeline."""

    def where(name: str) -> int:
        parts = name.split(".")
        return int(parts[parts.index("layers") + 1]) % ranks if "layers" in parts else 0

    return lambda tensors: placed(tensors, ranks, where)


def ep(ranks: int) -> Layout:
    """Ranges of experts; the rest on rank 0."""

    def ends(name: str, whole: Tensor) -> list[int]:
        if whole.ndim < 3:
            return [whole.numel()] * ranks
        each, matrix = whole.shape[0] // ranks, math.prod(whole.shape[1:])
        return [each * (rank + 1) * matrix for rank in range(ranks)]

    return lambda tensors: cut(tensors, ends)


def fsdp(ranks: int) -> Layout:
    """Rows in chunks, as torch.chunk cuts them: the last ranks' may be empty."""

    def ends(name: str, whole: Tensor) -> list[int]:
        rows = whole.shape[0] if whole.ndim else 1
        each = -(-rows // ranks)
        return [min(each * (rank + 1), rows) * (whole.numel() // rows) for rank in range(ranks)]

    return lambda tensors: cut(tensors, ends)


def zero(ranks: int) -> Layout:
    """Equal slices of all tensors end to end, wherever they begin and end."""

    def split(tensors: Mapping[str, Tensor]) -> list[list[Piece]]:
        each = -(-sum(t.numel() for t in tensors.values()) // ranks)
        at, starts = 0, {}
        for name, whole in tensors.items():
            starts[name], at = at, at + whole.numel()
        return cut(
            tensors, lambda name, t: [min(max(each * (r + 1) - starts[name], 0), t.numel()) for r in range(ranks)]
        )

    return split


LAYOUTS: dict[str, Layout] = {
    "one": lambda tensors: [pieces_of(tensors)], "pp2": pp(2), "pp4": pp(4), "ep2": ep(2), "ep4": ep(4),
    "fsdp3": fsdp(3), "fsdp9": fsdp(9), "zero2": zero(2), "zero7": zero(7),
    "dp3": lambda tensors: [pieces_of(tensors), [], []],
}  # fmt: skip


# ---- writing and reading in them ----


@pytest.fixture(scope="module")
def model(network: Callable[..., Transformer]) -> Transformer:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 8, "n_group": 2}
    heads = {"num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "v_head_dim": 4}
    return network(**sizes, **heads, num_nextn_predict_layers=1, qk_rope_head_dim=4)


@pytest.fixture(scope="module")
def state(model: Transformer) -> dict[str, Tensor]:
    """Steps, moments, one of them in BF16, and an average of the weights."""
    draw = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {}
    for number, (name, p) in enumerate(model.named_parameters()):
        found[f"step.{name}"] = torch.tensor(float(number))
        found[f"exp_avg.{name}"] = torch.randn(p.shape, generator=draw).bfloat16()
        found[f"exp_avg_sq.{name}"] = torch.rand(p.shape, generator=draw)
        found[f"ema.{name}"] = p.detach() * 0.5
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


Write = Callable[..., Path]


@pytest.fixture
def write(model: Transformer, state: dict[str, Tensor], tokenizer: Path, tmp_path: Path) -> Write:
    """write(weights, moments, step=3): the checkpoint that ranks with these pieces write, in tmp_path/run."""

    def run(weights: list[list[Piece]], moments: list[list[Piece]], step: int = 3) -> Path:
        def rank(ranks: Ranks) -> None:
            with Writer(tmp_path / "run", 9, ranks=ranks) as writer:
                mine = weights[ranks.rank], moments[ranks.rank]
                writer.save(step, model.config, *mine, {"samples": 5, "rank": ranks.rank}, tokenizer)

        on_ranks(len(weights), rank)
        return tmp_path / f"run/checkpoints/step-{step}"

    return run


def read_weights(folder: Path, layout: list[list[Piece]]) -> Iterator[tuple[Piece, Tensor]]:
    """Every piece of a layout with what is read for it."""
    for mine in layout:
        wanted = [p._replace(tensor=torch.full_like(p.tensor, float("nan"))) for p in mine]
        load_pieces(folder, wanted)
        yield from ((p, found.tensor) for p, found in zip(mine, wanted, strict=True))


def read_state(folder: Path, layout: list[list[Piece]]) -> Iterator[tuple[Piece, Tensor]]:
    stored = open_state(folder)
    for mine in layout:
        for p in mine:
            yield p, stored[p.name].read(p.start, p.start + p.tensor.numel()).view(p.tensor.shape)


def same(found: Iterator[tuple[Piece, Tensor]]) -> bool:
    return all(p.tensor.dtype == t.dtype and torch.equal(p.tensor, t) for p, t in found)


@pytest.mark.parametrize("before", LAYOUTS)
def test_any_layout_reads_what_any_other_wrote(
    before: str, write: Write, model: Transformer, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """pytorch#120356, Megatron-LM#1517: save EP2, load EP1 and EP4; save PP4, load EP4, moments included; and
    pytorch#163480: fsdp9 has more ranks than some norms have rows."""
    weights = model.state_dict()
    folder = write(LAYOUTS[before](weights), LAYOUTS[before](state))
    for after in {"ep2": ("one", "ep4"), "pp4": ("ep4", "zero7")}.get(before, ("pp4", "fsdp9")):
        assert same(read_weights(folder, LAYOUTS[after](weights)))
        assert same(read_state(folder, LAYOUTS[after](state)))
    loaded = load(folder).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in weights.items())
    averaged = dict(load_ema(load(folder), folder).named_parameters())
    assert all(torch.equal(averaged[name], p * 0.5) for name, p in model.named_parameters())
    assert read_checkpoint(folder).state["rank"] == 0


def test_one_layout_for_the_weights_another_for_the_moments(
    write: Write, model: Transformer, state: dict[str, Tensor]
) -> None:
    """ZeRO-1: rank 0 and 1 hold the same weights, and a slice of the moments each."""
    weights = [pieces_of(model.state_dict()), []]
    folder = write(weights, zero(2)(state))
    assert {p.name for p in folder.glob("*.safetensors")} == {
        "model.safetensors", "state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors",
    }  # fmt: skip
    assert same(read_state(folder, LAYOUTS["one"](state)))


@pytest.mark.parametrize("layout", ["ep2", "pp2", "fsdp3"])
def test_transformers_and_our_export_read_it_like_any_folder(
    layout: str, write: Write, model: Transformer, state: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = write(LAYOUTS[layout](model.state_dict()), LAYOUTS[layout](state))
    tokens = torch.arange(12)[None]
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(theirs.eval()(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    save(load(folder), tmp_path / "out", beside=folder)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
        "mtp.safetensors",
    }  # fmt: skip


@st.composite
def partitions(draw: st.DrawFn) -> tuple[int, Callable[[str, Tensor], list[int]]]:
    """A number of ranks, and any cut of any tensor among them."""
    ranks = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32))

    def ends(name: str, whole: Tensor) -> list[int]:
        generator = torch.Generator().manual_seed(seed + len(name) * 7919 + whole.numel())
        cuts = torch.randint(0, whole.numel() + 1, (ranks - 1,), generator=generator).tolist()
        return [*sorted(cuts), whole.numel()]

    return ranks, ends


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=partitions(), after=partitions())
def test_any_partition_reads_any_other(
    before: tuple[int, Any], after: tuple[int, Any], write: Write, model: Transformer, state: dict[str, Tensor]
) -> None:
    weights = model.state_dict()
    few = {name: t for name, t in state.items() if "layers.1." in name or "embed" in name}
    folder = write(cut(weights, before[1]), cut(few, before[1]))
    assert same(read_weights(folder, cut(weights, after[1])))
    assert same(read_state(folder, cut(few, after[1])))
    shutil.rmtree(folder)


def test_every_rank_writes_its_own_share_and_nothing_twice(
    write: Write, model: Transformer, state: dict[str, Tensor]
) -> None:
    folder = write(fsdp(4)(model.state_dict()), fsdp(4)(state))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    stored = [open_file(path) for path in sorted(folder.glob("model-*.safetensors"))]
    names = [name for file in stored for name in file]
    assert len(names) == len(set(names)) == len(index["weight_map"])
    sizes = [sum(tensor.nbytes for tensor in file.values()) for file in stored]
    assert sum(sizes) == index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert max(sizes) < 0.4 * sum(sizes)  # split tensors go where least is written


# ---- what is wrong is named ----


def test_pieces_that_do_not_make_a_whole_are_refused_on_all_ranks(
    write: Write, model: Transformer, state: dict[str, Tensor], tmp_path: Path
) -> None:
    weights = model.state_dict()
    half = {name: t for name, t in state.items() if "norm" not in name}

    def refused(weights: list[list[Piece]], moments: list[list[Piece]], line: str) -> None:
        with pytest.raises(CheckpointError, match=line):
            write(weights, moments)
        assert not steps_on_disk(tmp_path / "run")

    twice = [pieces_of(weights), [p for p in pieces_of(weights) if p.name == "norm.weight"]]
    refused(twice, [[], []], r"norm\.weight: value 0 is on rank 0 and on rank 1")
    short = cut(weights, lambda name, t: [t.numel() // 2, t.numel() - (name == "norm.weight")])
    refused(short, [[], []], r"norm\.weight: value 31 of 32 is on no rank")
    less = [[p for p in pieces_of(weights) if p.name != "norm.weight"], []]
    refused(less, [[], []], r"norm\.weight: the ranks have none, the network asks for \[32\]")
    more = [pieces_of(weights | {"x": torch.zeros(3)}), []]
    refused(more, [[], []], r"x: the ranks have \[3\], the network asks for none")
    moments = [pieces_of(half), pieces_of({"ema.embed_tokens.weight": torch.zeros(3)})]
    refused(
        [pieces_of(weights), []],
        moments,
        r"ema\.embed_tokens\.weight: rank 1 has float32 \[3\], rank 0 float32 \[40, 32\]",
    )
    again = [[*pieces_of(half), *pieces_of(half)], []]
    refused([pieces_of(weights), []], again, r"rank 0 has 2 pieces of step\..*; a rank holds one range of a tensor")


def stored_in(folder: Path, *held: dict[str, tuple[int, list[int], Tensor]]) -> Path:
    """A checkpoint's state of these (start, shape, values), a file a rank."""
    for number, mine in enumerate(held, start=1):
        places = {name: {"start": start, "shape": shape} for name, (start, shape, _) in mine.items()}
        tensors = {name: values for name, (*_, values) in mine.items()}
        path = folder / f"state-{number:05}-of-{len(held):05}.safetensors"
        save_file(tensors, path, {"pieces": json.dumps(places)})
    return folder


@pytest.mark.parametrize(
    ("second", "line"),
    [
        ((2, [2, 3], torch.ones(3)), "a: value 5 of 6 is in no file"),
        ((3, [2, 3], torch.ones(3)), "a: value 2 of 6 is in no file"),
        ((2, [2, 3], torch.ones(5)), "a: value 7 of 6 is in no file"),
        ((1, [2, 3], torch.ones(5)), r"a: value 1 is in state-00001.* and in state-00002"),
        ((2, [3, 2], torch.ones(4)), r"state-00002.*: a has another shape or dtype than in state-00001"),
        ((2, [2, 3], torch.ones(4).bfloat16()), r"state-00002.*: a has another shape or dtype than in state-00001"),
        ((-1, [2, 3], torch.ones(4)), "a.start = -1 should be greater than or equal to 0"),
        ((2, [-2, -3], torch.ones(4)), "a.shape.0 = -2 should be greater than or equal to 0"),
        ((2, [2, 3], torch.ones(2, 2)), None),
        ((2, [2, 3], torch.ones(4)), None),
    ],
)
def test_files_that_do_not_make_a_whole_are_named(
    second: tuple[int, list[int], Tensor], line: str | None, tmp_path: Path
) -> None:
    folder = stored_in(tmp_path, {"a": (0, [2, 3], torch.zeros(2))}, {"a": second, "b": (0, [1], torch.ones(1))})
    if line is None:
        assert open_state(folder)["a"].read().flatten().tolist() == [0, 0, 1, 1, 1, 1]
        return
    with pytest.raises(CheckpointError, match=line):
        open_state(folder)


def test_a_place_of_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "state.safetensors", {"pieces": '{"b": {"start": 0, "shape": [2]}}'})
    with pytest.raises(CheckpointError, match=r"pieces in its header names b, which the file does not hold"):
        open_state(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "state.safetensors", {"pieces": "[]"})
    with pytest.raises(CheckpointError, match=r"state\.safetensors: pieces in its header"):
        open_state(tmp_path)


def test_a_lost_file_of_one_rank_is_named_and_the_checkpoint_before_is_found(
    write: Write, model: Transformer, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """By all ranks, which share the reading of the checksums; and by whoever reads without them."""
    held = ep(2)(model.state_dict()), zero(3)(state)
    held = [*held[0], []], held[1]
    write(*held, step=3)
    folder = write(*held, step=6)
    (folder / "state-00002-of-00003.safetensors").unlink()
    for ranks in (1, 2, 5):
        found = on_ranks(ranks, lambda ranks: newest_checkpoint(tmp_path / "run", ranks))
        assert {(one.step, *passed) for one, passed in found if one} == {(3, *found[0][1])}
        assert "state-00002-of-00003.safetensors is missing, truncated or corrupt" in found[0][1][0]
    with pytest.raises(CheckpointError, match=r"value \d+ of \d+ is in no file"):
        open_state(folder)


def test_a_weight_that_is_not_in_the_folder_is_named(write: Write, model: Transformer, tmp_path: Path) -> None:
    folder = write([pieces_of(model.state_dict())], [[]])
    for wrong in (Piece("x", (3,), 0, torch.zeros(3)), Piece("norm.weight", (3,), 0, torch.zeros(3))):
        with pytest.raises(CheckpointError, match=rf"{wrong.name} is to have shape \[3\], there is (none|\[32\])"):
            load_pieces(folder, [wrong])


# ---- whole on all ranks or not at all ----


def runs_into(model: Transformer, state: dict[str, Tensor], run: Path, tokenizer: Path) -> Callable[[Ranks], str]:
    """A run of three ranks, which saves at step 5 and polls after every step until 100: the error it ends with."""
    weights, moments = fsdp(3)(model.state_dict()), zero(3)(state)

    def rank(ranks: Ranks) -> str:
        try:
            with Writer(run, 9, ranks=ranks) as writer:
                for step in range(100):
                    writer.poll()
                    if step == 5:
                        mine = weights[ranks.rank], moments[ranks.rank]
                        writer.save(step, model.config, *mine, {}, tokenizer)
        except (RunError, InputError) as error:
            return f"step {step}: {error}"
        return f"done at {step}"

    return rank


@pytest.mark.parametrize(
    ("victim", "rank"), [("write_file", 1), ("write_file", 2), ("write_config", 0), ("_sync", 0), ("copy_tokenizer", 0)]
)
def test_a_rank_whose_disk_is_full_fails_all_with_its_name(
    victim: str,
    rank: int,
    write: Write,
    model: Transformer,
    state: dict[str, Tensor],
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the same step, whichever file it is; the checkpoint before is untouched."""
    write([pieces_of(model.state_dict())], [[]], step=2)
    true = getattr(room, victim)

    def full(*given: Any) -> Any:
        if victim != "write_file" or f"-{rank + 1:05}-of-" in given[0].name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return true(*given)

    monkeypatch.setattr(room, victim, full)
    said = on_ranks(3, runs_into(model, state, tmp_path / "run", tokenizer))
    assert len(set(said)) == 1
    assert re.fullmatch(rf"step \d+: rank {rank}: the disk at .* is full, .*run cannot be written: make room", said[0])
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    assert read_checkpoint(tmp_path / "run/checkpoints/step-2").step == 2


def test_a_rank_with_another_disk_is_told_to_share_it(
    model: Transformer, state: dict[str, Tensor], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder of the same name is not the one rank 0 made."""
    monkeypatch.setattr(room, "SEEN_WITHIN", 0.2)
    (tmp_path / "b/checkpoints/.step-5.partial").mkdir(parents=True)
    (tmp_path / "b/checkpoints/.step-5.partial/.made").write_text("another")

    def rank(ranks: Ranks) -> str:
        return runs_into(model, state, tmp_path / "aab"[ranks.rank], tokenizer)(ranks)

    said = on_ranks(3, rank)
    assert len(set(said)) == 1
    assert re.search(r"rank 2: .*b/checkpoints/.step-5.partial, which rank 0 made, .* that all nodes share", said[0])
    assert not steps_on_disk(tmp_path / "a")


# ---- written while the run goes on ----


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What is written waits until this is set."""
    event = threading.Event()
    true = room.write_file

    def slow(*given: Any) -> Any:
        assert event.wait(20)
        return true(*given)

    monkeypatch.setattr(room, "write_file", slow)
    return event


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_written_is_what_was_saved_not_what_the_run_made_of_it_since(
    device: str, held_back: threading.Event, model: Transformer, tokenizer: Path, tmp_path: Path
) -> None:
    weights = {name: t.to(device, copy=True) for name, t in model.state_dict().items()}
    state = {"step.x": torch.tensor(1.0, device=device), "exp_avg.x": torch.ones(5, 3, device=device)}
    with Writer(tmp_path, 9) as writer:
        writer.save(1, model.config, pieces_of(weights), pieces_of(state), {}, tokenizer)
        for tensor in (*weights.values(), *state.values()):
            tensor.zero_()
        writer.poll()
        assert not steps_on_disk(tmp_path)
        held_back.set()
    folder = tmp_path / "checkpoints/step-1"
    assert same(read_weights(folder, [pieces_of(model.state_dict())]))
    assert open_state(folder)["exp_avg.x"].read().sum() == 15


def test_the_next_checkpoint_waits_for_the_one_before(
    held_back: threading.Event, model: Transformer, tokenizer: Path, tmp_path: Path
) -> None:
    with Writer(tmp_path, keep_last=2) as writer:
        for step in (1, 2, 3):
            writer.save(step, model.config, pieces_of(model.state_dict()), [], {}, tokenizer)
            assert steps_on_disk(tmp_path) == list(range(1, step))
            threading.Timer(0.05, held_back.set).start()
    assert steps_on_disk(tmp_path) == [2, 3]
    assert read_checkpoint(tmp_path / "checkpoints/step-3").step == 3


def test_an_interrupt_does_not_wait(
    held_back: threading.Event, model: Transformer, tokenizer: Path, tmp_path: Path
) -> None:
    """The second Ctrl-C: the checkpoint begun is lost, those before it are not."""
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, 9) as writer:
        writer.save(1, model.config, pieces_of(model.state_dict()), [], {}, tokenizer)
        raise KeyboardInterrupt
    assert not steps_on_disk(tmp_path)
    held_back.set()


def test_without_memory_for_a_copy_the_run_waits_until_all_is_written(
    model: Transformer, state: dict[str, Tensor], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all ranks, if one node lacks it."""
    short = iter([2**40, 10, 2**40, 2**40])
    monkeypatch.setattr(room, "available", lambda: next(short))
    monkeypatch.setattr(room.shares, "copied", None)

    def rank(ranks: Ranks) -> list[int]:
        writer = Writer(tmp_path, 9, ranks=ranks)
        writer.save(1, model.config, ep(4)(model.state_dict())[ranks.rank], zero(4)(state)[ranks.rank], {}, tokenizer)
        return steps_on_disk(tmp_path)

    assert on_ranks(4, rank) == [[1]] * 4
    assert same(read_state(tmp_path / "checkpoints/step-1", [pieces_of(state)]))
