"""leanseek doctor: what runs here, which path each op takes, and why; or what a group of processes can do."""

from __future__ import annotations

import json
import math
import os
import platform
from typing import Annotated, Any

import typer

from leanseek.cli.generate import AllowLinks
from leanseek.cli.terminal import spelled
from leanseek.errors import InputError

KINDS = ("float32", "bfloat16", "fp8 weights")
LEGEND = """
An entry holds for any number of rows unless it names one.
avx...: native kernels; gpu: GPU kernels; torch: the references.
-: never called this way   *: the faster path does not take these operands   +: widened to float32"""

GLOO = """gloo sends by TCP and adds on CPUs: its figures show that the group works and who is slow, not what GPUs reach
with NCCL. Its reduce_scatter is an all_reduce of which a part is kept."""


def examine() -> dict[str, Any]:
    """Versions, hardware, freshly measured limits, and the implementation of each op."""
    import torch

    from leanseek import native
    from leanseek.bench import survey
    from leanseek.machine import numa
    from leanseek.machine.device import default_device, multiplies, preferred_dtype
    from leanseek.machine.memory import memory
    from leanseek.machine.probes import gemm_rate
    from leanseek.machine.threads import cpus, quota, waiting
    from leanseek.native import panels

    device = default_device()
    kernels = native.status()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": cpus(),
        "cpu_quota": None if math.isinf(quota()) else quota(),
        "waiting": waiting(),
        "memory_bytes": memory("cpu"),
        "memory_nodes": numa.placement(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_in_hardware": preferred_dtype(device) == torch.bfloat16,
        "gemm_flops": {
            str(d).removeprefix("torch."): gemm_rate(d, device, 1024)
            for d in (torch.float32, torch.bfloat16)
            if device.type == "cuda" or multiplies(d)
        },
        "training_dtype": str(preferred_dtype(device)).removeprefix("torch."),
        "kernels": {"variant": kernels.variant, "detail": kernels.detail},
        "ops": [
            {
                "op": p.op, "use": p.use, "operands": p.kind,
                "rows": dict(zip(survey.ROWS, p.backends, strict=True)), "declined": p.declined, "widened": p.widened,
            }
            for p in survey.survey(device)
        ],
        "steps": panels.refusal() or "packed weights",
        "why_not_faster": survey.reasons(device),
    }  # fmt: skip


def examine_weights(model: str, allow_links: bool) -> dict[str, Any]:
    """The number of tensors in a model's folder, and by name how many values are NaN or infinity."""
    from leanseek import checkpoint
    from leanseek.checkpoint.finite import Census

    stored = checkpoint.open_checkpoint(checkpoint.resolve(model, allow_links))[1]
    return {"model": model, "tensors": len(stored), "nonfinite": Census().count(stored)}


def examine_group(timeout: float) -> dict[str, Any] | None:
    """What this process's group can do, measured; None on ranks other than the first.

    Raises:
        RunError: a rank does not come, or is lost; the line names it. One that hangs ends the process (`watch`).
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from leanseek.distributed import probes, watch
    from leanseek.distributed.rendezvous import holder, hosts, meet

    store = meet(timeout)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    with watch.watching(store, rank, ranks, timeout, holder()):
        if device is not None:
            torch.cuda.set_device(device)
        with watch.phase("the start of the group"):
            backend = "gloo" if device is None else "nccl"
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=4 * timeout)
            )
        found = probes.measure(device or torch.device("cpu"))
        places = hosts(store, ranks)
        with watch.phase("the end of the group"):
            dist.barrier()
        dist.destroy_process_group()
    if rank:
        return None
    return {
        "backend": backend,
        "ranks": ranks,
        "hosts": places,
        "collectives": [figure._asdict() for figure in found.figures],
        "product_seconds": found.products,
        "link_seconds": found.links,
        "slow": probes.slow(found),
    }


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="a Hugging Face folder or a run, to look at its weights"),
    ] = None,
    allow_links: AllowLinks = False,
    nproc: Annotated[int, typer.Option(min=1, help="processes on this machine, to measure their group")] = 1,
    timeout: Annotated[float, typer.Option(min=1.0, help="seconds after which a rank of a group is missing")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """What this machine has, which path each op takes, and why; or which of a model's weights are NaN or infinity.

    With --nproc, or under torchrun: latency and bandwidth of the group's collectives, and which rank is slow.
    """
    group = int(os.environ.get("WORLD_SIZE", "1")) > 1  # a launcher has started this process
    if model is not None and (group or nproc > 1):
        raise InputError("a model's weights are looked at by one process: leave out --nproc, or MODEL")
    if nproc > 1 and not group:
        from leanseek.distributed import launch

        raise typer.Exit(launch(nproc, saves=False))
    if group:
        if (found := examine_group(timeout)) is not None:
            print(json.dumps(found) if as_json else group_text(found))
        return
    if model is not None:
        weights = examine_weights(model, allow_links)
        if as_json:
            print(json.dumps(weights))
        else:
            for name, count in weights["nonfinite"].items():
                print(f"{spelled(name)}: {count:,} values are NaN or infinity")
        if bad := len(weights["nonfinite"]):
            raise InputError(f"{model}: {bad:,} of {weights['tensors']:,} tensors hold NaN or infinity")
        if not as_json:
            print(f"{spelled(model)}: {weights['tensors']:,} tensors, all of them finite")
        return
    found = examine()
    if as_json:
        print(json.dumps(found))
        return
    rates = ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in found["gemm_flops"].items())
    why = "multiplied in hardware" if found["bf16_in_hardware"] else "emulated here, so float32 is faster"
    print(f"python {found['python']}, torch {found['torch']}, {found['device']}, {found['threads']} threads")
    print(f"memory that may be used: {found['memory_bytes'] / 2**30:.1f} GiB; GEMM: {rates}")
    limit = "no quota" if found["cpu_quota"] is None else f"a quota of {found['cpu_quota']:.4g}"
    print(f"usable CPUs: {found['cpus']} ({limit}); idle threads: {found['waiting']}")
    print(f"memory nodes: {found['memory_nodes']}")
    print(f"training dtype: {found['training_dtype']} (bfloat16 is {why})")
    print(f"kernels: {found['kernels']['variant'] or 'none'}: {found['kernels']['detail']}")
    for use in dict.fromkeys(p["use"] for p in found["ops"]):
        print(f"\n{'ops in ' + use:28}" + "".join(f"{kind:22}" for kind in KINDS).rstrip())
        paths = [p for p in found["ops"] if p["use"] == use]
        for op in dict.fromkeys(p["op"] for p in paths):
            cells = {p["operands"]: _cell(p, found["kernels"]["variant"]) for p in paths if p["op"] == op}
            print(f"  {op:26}" + "".join(f"{cells.get(kind, '-'):22}" for kind in KINDS).rstrip())
    steps = found["steps"]
    print(f"\na served step: {'one native call over ' + steps if steps == 'packed weights' else f'op by op ({steps})'}")
    print(LEGEND)
    for what, why in found["why_not_faster"].items():
        print(f"no {what}: {why}")


def group_text(found: dict[str, Any]) -> str:
    """The group's figures as a table."""
    rows = found["collectives"]
    small, *sizes = sorted({row["size"] for row in rows})
    machines = len(set(found["hosts"]))
    lines = [
        f"{found['ranks']} ranks on {machines} machine{'s' * (machines > 1)}, {found['backend']}",
        f"{'':14}{_size(small):>12}" + "".join(f"{_size(size):>25}" for size in sizes),
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["size"]: row for row in rows if row["name"] == name}
        cells = (f"{own[size]['seconds'] * 1e3:12.3f} ms{own[size]['rate'] / 1e9:5.2f} GB/s" for size in sizes)
        lines.append(f"{name:14}{own[small]['seconds'] * 1e3:9.3f} ms" + "".join(cells))
    lines.append("by the size of a rank's largest buffer; GB/s: what a rank must send at least, over the time")
    lines += found["slow"] or ["no rank is slow: products and links of all are within twice the median"]
    if found["backend"] == "gloo":
        lines.append(GLOO)
    return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"


def _cell(path: dict[str, Any], variant: str | None) -> str:
    names = {"native": variant or "native", "torch": "torch"}
    by_rows = {rows: names.get(backend, backend) for rows, backend in path["rows"].items()}
    one, many = by_rows.values()
    notes = "*" * path["declined"] + "+" * path["widened"]
    return (one if one == many else f"{many}, 1 row: {one}") + notes
