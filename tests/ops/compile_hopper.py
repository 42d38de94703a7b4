"""Compiles every form of the SM90 product as it is launched there, without a GPU: the FP8 tensor cores, the copy
engine, no spills, shared memory that fits. Run by a test."""

from __future__ import annotations

import subprocess
import tempfile
from typing import Any

import triton
from compile_triton_fp8 import H100, KINDS, check
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource

from leanseek.gpu import hopper

SHARED_MEMORY = 232448  # bytes that a block can have
DESCRIPTORS = {
    "a": f"tensordesc<fp8e4nv[64, 128],{hopper.CODES!r}>",
    "b": f"tensordesc<fp8e4nv[128, 128],{hopper.CODES!r}>",
    "sb_rows": f"tensordesc<fp32[128],{hopper.SCALES!r}>",
}
POINTERS = DESCRIPTORS | {"sa": "*fp32", "sb": "*fp32"} | dict.fromkeys(KINDS["i32"], "*i32")


def compiled(group: int, b_rows: int, out: str, halves: int, stages: int) -> Any:
    """As `hopper._launch` asks for it, sizes that are multiples of 16."""
    kernel = hopper._product
    constants: dict[str, Any] = {"GROUP": group, "B_ROWS": b_rows, "HALVES": halves, "STAGES": stages}
    constants |= {"sb_rows" if b_rows == 128 else "sb": None}
    constants |= dict.fromkeys(KINDS["i32"]) if group == 0 else {}
    kinds = POINTERS | {"out": f"*{out}"} | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    whole = [name for name, kind in signature.items() if kind[0] == "*" or name in ("N", "K")]
    source = GluonASTSource(
        kernel, signature, {places[n]: v for n, v in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in whole},
    )  # fmt: skip
    return triton.compile(source, target=H100, options=hopper.LAUNCH)


def resources(ptx: str) -> str:
    """What the assembler says of registers, spills and lost overlap."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main() -> None:
    for group, b_rows, out in ((0, 128, "bf16"), (0, 1, "fp32"), (1, 128, "bf16"), (2, 1, "fp32")):
        for halves, stages in ((hopper.HALVES, hopper.STAGES), (1, 6)):
            kernel = compiled(group, b_rows, out, halves, stages)
            check(kernel.asm["ptx"], "wgmma.mma_async", "f32.e4m3.e4m3", "cp.async.bulk.tensor", "setmaxnreg")
            assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata.shared
            said = resources(kernel.asm["ptx"])
            check(said, " 0 bytes spill stores, 0 bytes spill loads")
            assert "serialized" not in said, said


if __name__ == "__main__":
    main()
