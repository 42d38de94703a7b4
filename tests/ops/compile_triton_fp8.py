"""Compiles every FP8 kernel for SM90 as it is launched there, without a GPU; fails with what is wrong. Run by a test."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leanseek.ops.triton import gemm, quantize, swiglu

H100 = GPUTarget("cuda", 90, 32)
KINDS = {
    "fp8e4nv": ("codes", "codes_t", "turned", "act_t", "a", "b"),
    "fp32": ("scales", "scales_t", "act_scales_t", "hidden_scales", "weights", "weight", "partial", "sa", "sb"),
    "i32": ("starts", "stops", "experts", "firsts"),
    "bf16": ("x", "grad", "hidden", "out"),
}
POINTERS = {name: f"*{kind}" for kind, names in KINDS.items() for name in names}
TABLES = KINDS["i32"]


def ptx(kernel: Any, constants: dict[str, Any], options: dict[str, int], **kinds: str) -> str:
    """Addresses and sizes are multiples of 16, as for whole widths of V3."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else kinds.get(name) or POINTERS.get(name, "i32")
        if name not in constants and name != "stride_sbk":
            attributes[(place,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=H100, options=options).asm["ptx"]


def check(text: str, *wanted: str) -> None:
    for instruction in wanted:
        assert instruction in text, f"no {instruction}"


def main() -> None:
    tile = {"TILE": 128, "POWER_OF_TWO": False}
    saturating = "cvt.rn.satfinite.e4m3x2.f32"
    rows_only = {"starts": None, "stops": None, "codes_t": None, "scales_t": None}
    small = tile | rows_only | {"GROUPED": False, "TURN": False, "ROWS": 32}
    check(ptx(quantize._tiles, small, {"num_warps": 4}), saturating, "div.rn.f32")
    check(ptx(quantize._tiles, tile | {"GROUPED": True, "TURN": True, "ROWS": 128}, {"num_warps": 16}), saturating)
    check(ptx(quantize._blocks, tile | {"TURN": True, "POWER_OF_TWO": True}, {"num_warps": 16}), saturating)
    product = gemm._product.fn
    config = gemm._product.configs[0]
    for group, rows in ((0, 128), (0, 1), (1, 128), (2, 1)):
        constants = {"GROUP": group, "B_ROWS": rows, "EVEN_K": group != 1, "TILE": 128} | config.kwargs
        constants |= dict.fromkeys(TABLES) if group == 0 else {}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        check(ptx(product, constants, options), "wgmma.mma_async", "f32.e4m3.e4m3", "cp.async")
    for coded in (False, True):
        kinds = {"hidden": "*fp8e4nv"} if coded else {}
        constants = tile | {"CODED": coded, "WEIGHTED": True} | ({} if coded else {"hidden_scales": None})
        check(ptx(swiglu._forward, constants | {"ROWS": 32}, {"num_warps": 4}, **kinds), saturating)
    constants = tile | {"CODED": True, "WEIGHTED": True, "GROUPED": True}
    check(ptx(swiglu._backward, constants, {"num_warps": 16}, hidden="*fp8e4nv"), saturating)


if __name__ == "__main__":
    main()
