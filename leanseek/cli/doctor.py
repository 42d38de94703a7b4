"""leanseek doctor: what runs here, which path each op takes, and why."""

from __future__ import annotations

import json
import math
import platform
from typing import Annotated, Any

import typer


def examine() -> dict[str, Any]:
    """Versions, hardware, limits measured now, and the implementation of each op."""
    import psutil
    import torch

    from leanseek import ops
    from leanseek.ops import cpu, numa
    from leanseek.ops.machine import default_device, gemm_rate, preferred_dtype
    from leanseek.threads import cpus, quota, waiting

    device = default_device()
    kernels = cpu.status()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": cpus(),
        "cpu_quota": None if math.isinf(quota()) else quota(),
        "waiting": waiting(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_nodes": numa.placement(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_in_hardware": preferred_dtype(device) == torch.bfloat16,
        "gemm_flops": {
            str(d).removeprefix("torch."): gemm_rate(d, device, 1024) for d in (torch.float32, torch.bfloat16)
        },
        "training_dtype": str(preferred_dtype(device)).removeprefix("torch."),
        "kernels": {"variant": kernels.variant, "detail": kernels.detail},
        "ops": ops.table(),
    }


def doctor(as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False) -> None:
    """What this machine has, which path each op takes, and why."""
    found = examine()
    if as_json:
        print(json.dumps(found))
        return
    rates = ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in found["gemm_flops"].items())
    why = "multiplied in hardware" if found["bf16_in_hardware"] else "emulated here, so float32 is faster"
    print(f"python {found['python']}, torch {found['torch']}, {found['device']}, {found['threads']} threads")
    print(f"memory: {found['memory_bytes'] / 2**30:.1f} GiB; GEMM: {rates}")
    limit = "no quota" if found["cpu_quota"] is None else f"a quota of {found['cpu_quota']:.4g}"
    print(f"CPUs that may be used: {found['cpus']} ({limit}); a thread without work: {found['waiting']}")
    print(f"memory nodes: {found['memory_nodes']}")
    print(f"training dtype: {found['training_dtype']} (bfloat16 is {why})")
    print(f"kernels: {found['kernels']['variant'] or 'none'}: {found['kernels']['detail']}")
    for op, backends in found["ops"].items():
        print(f"  {op}: {', '.join([*backends, 'torch reference'])}")
