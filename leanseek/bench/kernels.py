"""Speed of single kernels beside the machine's limits: products against its GEMM rate, the rest against its copy rate.

On a GPU: the FP8 kernels against `torch.mm` in BF16. On a CPU: the ops of training and of serving. Kernels that are
compared take turns, so that both see the same clock.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek import native, ops
from leanseek.bench.machine import fastest_dtype, machine
from leanseek.machine.device import default_device, preferred_dtype

ROUNDS = 15


class Case(NamedTuple):
    name: str
    work: Callable[[], object]
    flops: float = 0.0  # per call; 0 if memory bounds it
    bytes: float = 0.0  # read and written by a call, at least
    against: str = ""  # the case that this one is compared with
    op: str = ""  # of `paths.ran`: which path computed it


def bench_kernels(size: int | None = None, rounds: int | None = None) -> dict[str, Any]:
    """`size`: rows, and the side of the square product (a GPU: 4096, else 2048). V3's widths shrink with it below 4096.

    Every case has medians over `rounds`, its speed, and its share of the machine's limit of that kind.
    """
    device, rounds = default_device(), rounds or ROUNDS
    size = size or (4096 if device.type == "cuda" else 2048)
    copy = torch.ones(max(size * size * 4, 2**25), dtype=torch.bfloat16, device=device)  # more than the caches hold
    limit = Case("copy", functools.partial(torch.empty_like(copy).copy_, copy), bytes=2 * copy.nbytes)
    make = _gpu_cases if device.type == "cuda" else _cpu_cases
    results: dict[str, dict[str, Any]] = {}
    for group in [[limit], *make(size, device)]:
        results |= _take_turns(group, rounds, device)
    limits = machine()
    for result in results.values():
        if "flops_per_second" in result:
            result["share_of_gemm"] = result["flops_per_second"] / limits[f"gemm_flops_{fastest_dtype(limits)}"]
        if "bytes_per_second" in result:
            result["share_of_copy"] = result["bytes_per_second"] / results["copy"]["bytes_per_second"]
    return {
        "benchmark": "kernels", "size": size, "rounds": rounds, "machine": limits, "paths": _paths(device),
        "results": results,
    }  # fmt: skip


def _take_turns(cases: list[Case], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Medians of cases that alternate; a GPU's cache is emptied before each, which takes longer than launching it."""
    flush = torch.empty(2**30 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    paths: dict[str, str] = {}
    for turn in range(rounds + 1):
        for case in cases:
            before = _ran(case)
            flush.zero_()
            took = _seconds(case.work, device)
            if turn:  # the first compiles and tunes
                seconds[case.name].append(took)
            if case.op:
                paths[case.name] = next(p for p, n in _ran(case).items() if n > before.get(p, 0))
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        median = statistics.median(seconds[case.name])
        result: dict[str, Any] = {"seconds": median}
        if case.flops:
            result["flops_per_second"] = case.flops / median
        if case.bytes:
            result["bytes_per_second"] = case.bytes / median
        if case.against:
            result["against"], result["speed_ratio"] = case.against, found[case.against]["seconds"] / median
        if case.name in paths:
            result["path"] = paths[case.name]
        found[case.name] = result
    return found


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    work()
    stop_event.record()
    stop_event.synchronize()
    return start_event.elapsed_time(stop_event) / 1000


def _widths(size: int, *widths: int) -> list[int]:
    """V3's widths, in proportion for a size under 4096; multiples of 128."""
    return [max(128, width * min(size, 4096) // 4096 // 128 * 128) for width in widths]


def _shapes(size: int) -> list[tuple[int, int, int]]:
    """Products [m, k] · [k, n]: a square one and V3's, each once."""
    wide, narrow, dense = _widths(size, 7168, 2048, 18432)
    return list(dict.fromkeys([(size, size, size), (size, narrow, wide), (size, dense, wide)]))


# ---- on a GPU ----


def _gpu_cases(size: int, device: torch.device) -> Iterator[list[Case]]:
    from leanseek.gpu.device import refusal

    draw = functools.partial(torch.randn, dtype=torch.bfloat16, device=device)
    if reason := refusal(device):
        raise RuntimeError(f"the FP8 kernels do not run here: {reason}")
    wide, narrow, dense = _widths(size, 7168, 2048, 18432)
    for m, n, k in _shapes(size):
        yield _gpu_product(draw(m, k), draw(n, k))
    yield _gpu_experts(draw(size * 2, wide), draw(8, 2 * narrow, wide))
    yield from _gpu_quantisers(
        draw(size * 2, wide), torch.randn(dense, wide, device=device), draw(size * 2, 2 * narrow)
    )


def _gpu_product(a: Tensor, b: Tensor) -> list[Case]:
    """A linear layer's forward and weight gradient, by the path that is taken and by Triton's kernel."""
    from leanseek.gpu import gemm, paths
    from leanseek.gpu.quantize import quantize_blocks, quantize_both

    (m, k), n = a.shape, b.shape[0]
    flops = 2.0 * m * n * k
    tiles, turned = quantize_both(a)
    weight = quantize_blocks(b)
    grad = torch.randn(m, n, dtype=a.dtype, device=a.device)
    grad_turned = quantize_both(grad)[1]
    name = f"{m}×{n}×{k}"
    forward, backward = f"BF16 torch.mm {name}", f"BF16 torch.mm {name} weight gradient"
    return [
        Case(forward, lambda: torch.mm(a, b.t()), flops),
        Case(f"FP8 {name}", lambda: paths.product(tiles, weight), flops, against=forward, op="product"),
        Case(f"FP8 {name} by triton", lambda: gemm.product(tiles, weight), flops, against=forward),
        Case(backward, lambda: torch.mm(grad.t(), a), flops),
        Case(
            f"FP8 {name} weight gradient", lambda: paths.product(grad_turned, turned, torch.float32), flops,
            against=backward, op="weight gradient",
        ),
        Case(
            f"FP8 {name} weight gradient by triton", lambda: gemm.product(grad_turned, turned, torch.float32), flops,
            against=backward,
        ),
    ]  # fmt: skip


def _gpu_experts(x: Tensor, weight: Tensor) -> list[Case]:
    """Eight experts with uneven counts."""
    from leanseek.gpu import gemm, paths
    from leanseek.gpu.quantize import quantize_blocks, quantize_both
    from leanseek.ops.grouped import group_tiles

    m, (experts, n, k) = x.shape[0], weight.shape
    shares = torch.arange(1, experts + 1, device=x.device).cumsum(0)
    ends = (shares * m // shares[-1]).int()
    tiles = group_tiles(ends, m)
    grad = torch.randn(m, n, dtype=x.dtype, device=x.device)
    (codes, turned), grad_turned = quantize_both(x, tiles=tiles), quantize_both(grad, tiles=tiles)[1]
    blocks = quantize_blocks(weight)
    flops, name = 2.0 * m * n * k, f"{m}×{n}×{k}"
    forward, backward = (f"BF16 grouped_mm {experts} experts {name}{form}" for form in ("", " weight gradient"))
    return [
        Case(forward, lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends), flops),
        Case(
            f"FP8 {experts} experts {name}", lambda: paths.grouped_product(codes, blocks, tiles), flops,
            against=forward, op="grouped product",
        ),
        Case(
            f"FP8 {experts} experts {name} by triton", lambda: gemm.grouped_product(codes, blocks, tiles), flops,
            against=forward,
        ),
        Case(backward, lambda: F.grouped_mm(grad.t(), x, offs=ends), flops),
        Case(
            f"FP8 {experts} experts {name} weight gradient",
            lambda: paths.grouped_weight_gradient(grad_turned, turned, tiles), flops, against=backward,
            op="grouped weight gradient",
        ),
    ]  # fmt: skip


def _gpu_quantisers(x: Tensor, weight: Tensor, hidden: Tensor) -> Iterator[list[Case]]:
    from leanseek.gpu.quantize import quantize_blocks_both, quantize_both, quantize_tiles, round_e5m6, turn_tiles
    from leanseek.gpu.swiglu import swiglu_backward_quantize, swiglu_quantize

    values, code = x.numel(), 1 + 4 / 128  # a code and its share of a scale
    act = hidden.numel() / 2
    grad = torch.randn_like(hidden[:, : hidden.shape[1] // 2])
    kept = quantize_tiles(hidden, True)
    index = torch.randint(0, x.shape[0], (x.shape[0],), device=x.device)
    yield [
        Case("quantise 1×128", lambda: quantize_tiles(x, True), bytes=values * (2 + code)),
        Case("quantise 1×128 and transpose", lambda: quantize_both(x, True), bytes=values * (2 + 2 * code)),
        Case("transpose of chosen rows", lambda: turn_tiles(x, True, index=index), bytes=values * (2 + code)),
        Case("rows of experts", lambda: kept.index_select(0, index), bytes=2 * hidden.numel() * code),
        Case(
            "quantise 128×128 and transpose", lambda: quantize_blocks_both(weight, True),
            bytes=weight.numel() * (weight.element_size() + 2.0),
        ),
        Case("E5M6", lambda: round_e5m6(x), bytes=4.0 * values),
        Case("SwiGLU and quantise", lambda: swiglu_quantize(hidden, None, True), bytes=act * (4 + 3 * code)),
        Case(
            "SwiGLU backward and quantise",
            lambda: swiglu_backward_quantize(grad, kept, power_of_two=True),
            bytes=act * (2 + 7 * code),
        ),
    ]  # fmt: skip


# ---- on a CPU ----


def _cpu_cases(size: int, device: torch.device) -> Iterator[list[Case]]:
    """The ops of training in the dtype that this CPU multiplies best, and serving's linear at one row."""
    draw = functools.partial(torch.randn, dtype=preferred_dtype(device))
    wide, narrow, dense = _widths(size, 7168, 2048, 18432)
    for m, n, k in _shapes(size):
        a, b = draw(m, k), draw(n, k)
        yield [Case(f"linear {m}×{n}×{k}", functools.partial(ops.linear, a, b), 2.0 * m * n * k)]
    yield [_cpu_experts(draw(size, wide), draw(8, 2 * narrow, wide), draw(8, wide, narrow))]
    yield _cpu_elementwise(draw(size, dense), draw(size, dense))
    yield _cpu_serving(draw(1, wide), draw(dense, wide))


def _cpu_experts(x: Tensor, gate_up: Tensor, down: Tensor) -> Case:
    experts, n = gate_up.shape[0], x.shape[0]
    indices = torch.stack([torch.arange(n) % experts, (torch.arange(n) + 1) % experts], 1)
    weights = torch.full((n, 2), 0.5)
    flops = 2.0 * 2 * n * (gate_up[0].numel() + down[0].numel())
    work = functools.partial(ops.experts, x, indices, weights, gate_up, down)
    return Case(f"{experts} experts, {n} tokens of 2", work, flops)


def _cpu_elementwise(gate: Tensor, up: Tensor) -> list[Case]:
    weight = torch.ones(gate.shape[1])
    return [
        Case("SwiGLU", functools.partial(ops.swiglu, gate, up), bytes=3.0 * gate.nbytes),
        Case("RMSNorm", functools.partial(ops.rms_norm, gate, weight, 1e-6), bytes=2.0 * gate.nbytes),
    ]


def _cpu_serving(x: Tensor, weight: Tensor) -> list[Case]:
    """Decoding's linear: every weight is read once for one row, so that FP8 can be twice as fast as BF16."""
    scales = torch.ones(ops.FP8_BLOCKS.scale_shape(weight.shape))
    fp8 = ops.QuantizedWeight(weight.to(torch.float8_e4m3fn), scales, ops.FP8_BLOCKS)

    def run(stored: ops.StoredWeight) -> Tensor:
        with ops.row_invariant(), torch.no_grad():
            return ops.linear(x, stored)

    full = f"linear of one row, {str(weight.dtype).removeprefix('torch.')}"
    return [
        Case(full, functools.partial(run, weight), bytes=float(weight.nbytes)),
        Case("linear of one row, FP8 blocks", functools.partial(run, fp8), bytes=float(fp8.data.nbytes), against=full),
    ]


# ---- which path ----


def _ran(case: Case) -> dict[str, int]:
    if not case.op:
        return {}
    from leanseek.gpu import paths

    return paths.ran().get(case.op, {})


def _paths(device: torch.device) -> dict[str, str]:
    """What may compute FP8 products here, and why not."""
    if device.type != "cuda":
        return {"cpu": native.status().detail}
    from leanseek.gpu import paths

    return paths.status(device)
