"""Compiles every Triton kernel for SM90 as it is launched there, without a GPU; fails with what is wrong. Run by a test."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leanseek.gpu import attention, elementwise, gemm, quantize, swiglu

H100 = GPUTarget("cuda", 90, 32)
KINDS = {
    "fp8e4nv": ("codes", "codes_t", "kept", "a", "b"),
    "fp32": (
        "scales",
        "scales_t",
        "act_scales_t",
        "hidden_scales",
        "kept_scales",
        "x_scales",
        "weights",
        "partial",
        "sa",
        "sb",
    ),
    "i32": ("starts", "stops", "experts", "firsts"),
    "bf16": ("x", "grad", "hidden", "out", "weight"),
}
POINTERS = {name: f"*{kind}" for kind, names in KINDS.items() for name in names}
TABLES = KINDS["i32"]


def ptx(kernel: Any, constants: dict[str, Any], options: dict[str, int], **kinds: str) -> str:
    return str(compiled(kernel, constants, options, **kinds)["ptx"])


def compiled(kernel: Any, constants: dict[str, Any], options: dict[str, int], **kinds: str) -> Any:
    """Addresses and sizes are multiples of 16, as for whole widths of V3."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else kinds.get(name) or POINTERS.get(name, "i32")
        if name not in constants and name != "stride_sbk":
            attributes[(place,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=H100, options=options).asm


def check(text: str, *wanted: str) -> None:
    for instruction in wanted:
        assert instruction in text, f"no {instruction}"


def dead_bytes(cubin: bytes) -> list[str]:
    """Where the machine code takes a 16-bit value from the stack pointer, which stands for what was never written:
    ptxas 12.8 did so to codes that are packed for a store and also used one by one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "LDG" in listing
    return re.findall(r"LOP3.*, R1(?:\.reuse)?, 0xffff.*", listing)


def main() -> None:
    tile = {"TILE": 128, "POWER_OF_TWO": False}
    saturating = "cvt.rn.satfinite.e4m3x2.f32"
    check(ptx(quantize._rows, tile | {"ROWS": 32}, {"num_warps": 4}), saturating, "div.rn")
    both = tile | dict.fromkeys(("x_scales", "index"))
    turn = tile | dict.fromkeys(("codes", "scales")) | {"POWER_OF_TWO": True}
    for one_group in ({}, dict.fromkeys(("starts", "stops"))):
        check(ptx(quantize._turned, both | one_group, quantize.TURN, codes_t="*i32"), saturating)
        kinds = {"x": "*fp8e4nv", "index": "*i64", "codes_t": "*i32"}
        check(ptx(quantize._turned, turn | one_group, quantize.TURN, **kinds), saturating)
        kinds = {"hidden": "*fp8e4nv", "codes_t": "*i32", "act_t": "*i32"}
        check(ptx(swiglu._backward, tile | one_group, swiglu.BACKWARD, **kinds), saturating)
    for kind in ("*fp32", "*bf16"):
        constants = tile | {"POWER_OF_TWO": True}
        blocks = compiled(quantize._blocks, constants, {"num_warps": quantize.BLOCK_WARPS}, weight=kind)
        check(blocks["ptx"], saturating)
        assert not dead_bytes(blocks["cubin"]), "the assembler takes codes from a register that holds none"
    ptx(quantize._e5m6, {"TILE": 128, "ROWS": 32}, {"num_warps": 8})
    product = gemm._product.fn
    config = gemm._product.configs[0]
    for group, rows in ((0, 128), (0, 1), (1, 128), (2, 1)):
        constants = {"GROUP": group, "B_ROWS": rows, "EVEN_K": group != 1, "TILE": 128} | config.kwargs
        constants |= dict.fromkeys(TABLES) if group == 0 else {}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        check(ptx(product, constants, options), "wgmma.mma_async", "f32.e4m3.e4m3", "cp.async")
    check(ptx(swiglu._forward, tile | {"ROWS": 16}, {"num_warps": 4}), saturating)
    check_the_rest()


def check_the_rest() -> None:
    """What is no FP8: that it compiles at all."""
    bf16 = "q kv k_rope query key dq dkv dk_rope dk dv dx gate up dgate dup rows logits exp_avg exp_avg_sq".split()
    kinds = dict.fromkeys(bf16, "*bf16") | dict.fromkeys(("targets", "place"), "*i64")
    kinds |= dict.fromkeys(("cos", "sin", "inverse", "partial", "weight", "losses", "step"), "*fp32")
    kinds |= dict.fromkeys(("eps", "share", "lr", "beta1", "beta2", "decay"), "fp32")
    heads = {"HALF": 32, "PAIRS": 32, "BLOCK": 128, "HEADS": attention.HEADS}
    for kernel, interleave in ((attention._place, True), (attention._place, False), (attention._gather, True)):
        ptx(kernel, heads | {"INTERLEAVE": interleave}, {"num_warps": attention.WARPS}, **kinds)
    for columns in (512, 2048, 7168):
        tile = elementwise._tile(columns)
        for kernel in (elementwise._norm, elementwise._norm_backward):
            ptx(
                kernel,
                dict(zip(("ROWS", "BLOCK"), tile, strict=True)),
                {"num_warps": elementwise._warps(tile)},
                **kinds,
            )
    ptx(elementwise._softmax, {"NEED": True, "BLOCK": 4096}, {"num_warps": 8}, **kinds)
    forward = dict.fromkeys(("weight", "grad", "dgate", "dup", "partial"))
    for absent in (forward, {}):
        ptx(elementwise._swiglu, {"BLOCK": 1024} | absent, {"num_warps": 4}, **kinds)
    ptx(elementwise._combine, {"K": 4, "BLOCK": 1024}, {"num_warps": 4}, **kinds)
    ptx(elementwise._adamw, {"BLOCK": 2048}, {"num_warps": 8}, **kinds | {"grad": "*fp32"})


if __name__ == "__main__":
    main()
