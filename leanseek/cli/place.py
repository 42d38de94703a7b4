"""leanseek place: which GPU serves which expert, from recorded loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from leanseek.cli.terminal import spelled
from leanseek.errors import InputError
from leanseek.reading import Structure, checked, read_json, read_toml, shorten

ROWS = 10  # of a run's rows with `load`, the newest that are averaged


class Recorded(NamedTuple):
    """How busy each expert was."""

    load: dict[int, list[float]]  # by layer; MoE layers only
    layers: int  # of the main model, dense ones included
    groups: int
    source: str  # what the figures are, in words


class _Counts(Structure):
    """Recorded counts: of experts [layers, experts], or of slots [layers, slots] with the expert in each."""

    logical_count: list[Any] | None = None
    physical_count: list[Any] | None = None
    physical_to_logical_map: list[list[int]] | None = None


def read_loads(source: Path) -> Recorded:
    """The loads that a run recorded, or those in a JSON file as SGLang counts them (with or without steps).

    Raises:
        InputError: it is neither, or has no loads.
    """
    return _from_run(source) if source.is_dir() else _from_file(source)


def _from_run(folder: Path) -> Recorded:
    from leanseek.config import ModelConfig
    from leanseek.training.metrics import read_rows

    rows = [row["load"] for row in read_rows(folder / "metrics.jsonl") if row.get("load")][-ROWS:]
    if not rows:
        raise InputError(f"{folder} has no recorded loads: it is not the folder of a run with routed experts")
    model = ModelConfig.from_dict(read_toml(folder / "config.toml").get("model", {}))
    try:
        load = {
            int(layer): [sum(x) / len(rows) for x in zip(*(row[layer] for row in rows), strict=True)]
            for layer in rows[-1]
        }
    except (TypeError, ValueError, KeyError, AttributeError):
        raise InputError(f"{folder / 'metrics.jsonl'}: `load` is not numbers per expert by layer") from None
    steps = f"the last {len(rows)} recorded steps" if len(rows) > 1 else "the one recorded step"
    return Recorded(load, model.num_hidden_layers, model.n_group, f"mean over {steps}")


def _from_file(path: Path) -> Recorded:
    from leanseek.planning import expert_loads

    found = checked(_Counts, read_json(path), str(path))
    if found.logical_count is not None:
        rows = _added(found.logical_count, path)
    elif found.physical_count is not None and found.physical_to_logical_map:
        slots = found.physical_to_logical_map
        experts = 1 + max((e for row in slots for e in row), default=-1)
        if min((e for row in slots for e in row), default=-1) < 0 or len(slots) != len(found.physical_count):
            raise InputError(f"{path}: physical_to_logical_map must name an expert for each slot of each counted layer")
        rows = expert_loads(_added(found.physical_count, path), slots, experts)
    else:
        raise InputError(f"{path} has neither logical_count nor physical_count with its physical_to_logical_map")
    load = {layer: row for layer, row in enumerate(rows) if any(row)}
    if not load:
        raise InputError(f"{path} counts no tokens")
    dense = f"; {len(rows) - len(load)} without tokens are taken as dense" if len(load) < len(rows) else ""
    return Recorded(load, len(rows), 1, f"counts of {len(rows)} layers{dense}")


def _added(counts: list[Any], path: Path) -> list[list[float]]:
    """Counts [layers, experts], from [steps, layers, experts] by adding up."""
    import numpy as np

    try:
        array = np.asarray(counts, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.ndim not in (2, 3) or not array.size:
        raise InputError(f"{path}: counts are numbers [layers, experts] or [steps, layers, experts]")
    return (array.sum(0) if array.ndim == 3 else array).tolist()


def place(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="a run, or a JSON file with logical_count")],
    replicas: Annotated[int, typer.Option(help="slots of a layer over all GPUs: experts and their copies")],
    gpus: Annotated[int, typer.Option(help="GPUs that share the experts")],
    out: Annotated[Path, typer.Option(help="the file to write")],
    nodes: Annotated[int, typer.Option(help="nodes they stand in")] = 1,
    groups: Annotated[int | None, typer.Option(help="groups of experts; those of the run, else 1")] = None,
    format: Annotated[str, typer.Option(help="sglang, vllm or vllm-ascend")] = "sglang",
    plot: Annotated[Path | None, typer.Option(help="a picture of the loads (.png, .svg)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Place the copies of each expert on GPUs so that these have equal work, for SGLang or vLLM."""
    from leanseek import planning
    from leanseek.planning.placement_files import FORMATS, placement_file, serving_options
    from leanseek.writing import replace_file, writing

    if format not in FORMATS:
        raise InputError(f"--format {shorten(format)!r} is not one of {', '.join(FORMATS)}")
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot} must end in .png, .svg or .pdf")
    found = read_loads(source)
    groups = found.groups if groups is None else groups
    load = list(found.load.values())
    placement = planning.place_experts(load, replicas, groups, nodes, gpus)
    experts = len(load[0])
    before = planning.gpu_loads(load, planning.round_robin(len(load), experts, replicas), gpus)
    after = planning.gpu_loads(load, placement, gpus)
    content = placement_file(format, dict(zip(found.load, placement, strict=True)), found.layers, experts, gpus)
    with writing(out):
        replace_file(out, json.dumps(content).encode())
    mode = "hierarchical" if groups % nodes == 0 else f"global: {nodes} nodes do not divide {groups} groups"
    if plot is not None:
        from leanseek.planning.placement_chart import draw_placement

        name = f"{experts} experts in {replicas} slots on {gpus} GPUs, {mode}"
        with writing(plot):
            draw_placement(plot, list(found.load), before, after, name)
    peaks = {
        layer: {"before": max(b) * gpus / sum(b), "after": max(a) * gpus / sum(a)}
        for layer, b, a in zip(found.load, before, after, strict=True)
    }
    repeated = planning.repeats(placement, gpus)
    options = serving_options(format, str(out), replicas - experts, gpus)
    if as_json:
        summary = {"out": str(out), "mode": mode, "loads": found.source, "max_over_mean": peaks, "repeats": repeated}
        print(json.dumps(summary | {"options": options}))
        return
    worst = max(peaks, key=lambda layer: peaks[layer]["after"])
    print(f"{spelled(str(source))}: {found.source}")
    print(f"{experts} experts in {replicas} slots on {gpus} GPUs of {nodes} nodes, {mode}")
    print("busiest GPU, 1 = the mean:  experts in order -> placed by load")
    means = [sum(peak[when] for peak in peaks.values()) / len(peaks) for when in ("before", "after")]
    print(f"  mean of {len(peaks)} layers  {means[0]:.3f} -> {means[1]:.3f}")
    print(f"  worst, layer {worst}  {peaks[worst]['before']:.3f} -> {peaks[worst]['after']:.3f}")
    if repeated:
        print(f"{repeated} slots hold an expert that their GPU has already: more slots a GPU than experts to fill them")
    if left := [layer for layer in found.load if layer >= found.layers]:
        print(f"not in the file, MTP layers: {', '.join(map(str, left))}; engines place these themselves")
    print(f"{spelled(str(out))}: {options}")
