"""Finding, loading and calling the compiled kernels.

CMakeLists.txt builds one library per instruction set, each a plain C interface over pointers and sizes. The best that
this CPU has is loaded, or the one that LEANSEEK_CPU names ("none" leaves all out). They share torch's OpenMP threads:
torch's own runtime library is made visible to them here, so that no second pool of threads comes into the process.

A library is left out, and a line says so, when the sources have changed since it was built: its functions may take
other arguments, and would read them wrongly.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from leanseek.errors import InputError
from leanseek.ops.dispatch import Op, Priority, Rows, ordinary

F = TypeVar("F", bound=Callable[..., Any])

VARIANTS = ("avx512_bf16", "avx512", "avx2")  # best first
NONE = "none"  # what LEANSEEK_CPU names to run on the torch references
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # kernels.h: enum Dtype
_LETTERS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}
_FORCED: list[str] = []  # innermost `use_variant` last


STALE = "left out: built before leanseek/native/kernels changed; rebuild them with `pip install -e .`"
_NO_MEMORY = "native kernels read memory: what they computed can be neither differentiated nor repeated by a tracer"


class Status(NamedTuple):
    """What `leanseek doctor` says of the kernels."""

    variant: str | None  # the instruction set in use; None: the torch references run
    detail: str  # one line: the library loaded, or why none is


def status() -> Status:
    variants = _usable()
    if variants:
        return Status(variants[0], f"{_path(variants[0])}, threads shared with {_openmp()}")
    if os.environ.get("LEANSEEK_CPU") == NONE:
        return Status(None, f"left out: LEANSEEK_CPU={NONE}")
    built = [v for v in VARIANTS if _path(v).exists()]
    if not built:
        return Status(None, "not built (no C++ compiler at install, or not Linux on x86-64)")
    if any(_stale(v) for v in built):
        return Status(None, STALE)
    if _openmp() is None:
        return Status(None, "torch's OpenMP library was not found among the loaded ones")
    return Status(None, f"built for {', '.join(built)}, which this CPU does not have")


def kernel(name: str, signature: str) -> Callable[..., None]:
    """The C function `name`; `signature` has a letter an argument: p pointer (or None), n int64, f float32.

    It is looked up at the first call, in the variant then in use.
    """
    types = [_LETTERS[letter] for letter in signature.replace(" ", "")]

    @functools.cache
    def bound(variant: str) -> Callable[..., None]:
        function = getattr(_load(variant), name)
        function.argtypes, function.restype = types, None
        return function

    def call(*arguments: object) -> None:
        if not ordinary():
            raise RuntimeError(_NO_MEMORY)
        torch.get_num_threads()  # on a new thread this sets OpenMP's number, which the kernels go by
        bound(_FORCED[-1] if _FORCED else _usable()[0])(*arguments)

    return call


class Function(torch.autograd.Function):
    """A function whose backward runs kernels too, and refuses gradients without memory (fake, functional, batched)."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        native = cls.backward

        def backward(ctx, *grads):  # type: ignore[no-untyped-def]
            if not ordinary(*grads):
                raise RuntimeError(_NO_MEMORY)
            return native(ctx, *grads)

        cls.backward = staticmethod(backward)  # type: ignore[method-assign]


def implements(op: Op[..., Any], accepts: Callable[..., bool], rows: Rows = Rows.ANY) -> Callable[[F], F]:
    """Decorator: the function computes `op` with kernels where `accepts`, called as the op is, holds."""
    return op.register("native", accepts, Priority.KERNEL, rows)


def accepts(*arguments: object) -> bool:
    """Whether kernels take the tensors among these: on the CPU, FP32 or BF16, and contiguous in the last dimension."""
    return all(
        t.device.type == "cpu" and t.dtype in DTYPES and (t.numel() == 1 or t.stride(-1) == 1 or t.shape[-1] == 1)
        for t in arguments
        if isinstance(t, Tensor)
    )


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Addresses for a kernel's `p` arguments. The tensors must outlive the call: pass none made on the spot."""
    return [None if t is None else t.data_ptr() for t in tensors]


@contextlib.contextmanager
def use_variant(variant: str) -> Iterator[None]:
    """Force an instruction set of `usable_variants()` within the context; process-wide, for tests and measurements."""
    _FORCED.append(variant)
    try:
        yield
    finally:
        _FORCED.pop()


def usable_variants() -> tuple[str, ...]:
    """The instruction sets that are built and that this CPU has: the one that runs first, then best first.

    Raises:
        InputError: LEANSEEK_CPU names another.
    """
    return _usable()


@functools.cache
def _usable() -> tuple[str, ...]:
    wanted = os.environ.get("LEANSEEK_CPU")
    if wanted == NONE:
        return ()
    built = [v for v in VARIANTS if _path(v).exists()] if _openmp() else []
    stale = [v for v in built if _stale(v)]
    if stale:
        print(f"leanseek: CPU kernels are {STALE}", file=sys.stderr, flush=True)
    usable = [v for v in built if v not in stale and _load(v).supported()]
    if wanted:
        if wanted not in usable:
            raise InputError(
                f"LEANSEEK_CPU={wanted} names no kernels for this CPU; choose {', '.join([*usable, NONE])}"
            )
        usable.sort(key=lambda v: v != wanted)
    return tuple(usable)


def _path(variant: str) -> Path:
    return Path(__file__).parent / f"libleanseek_{variant}.so"


@functools.cache
def _load(variant: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(_path(variant)))


def _stale(variant: str) -> bool:
    """Whether the sources are here, and are not those that the library was built from."""
    here, library = _sources(Path(__file__).parent / "kernels"), _load(variant)
    if not hasattr(library, "sources"):
        return here is not None
    library.sources.restype = ctypes.c_char_p
    return here is not None and library.sources().decode() != here


@functools.cache
def _sources(folder: Path) -> str | None:
    """A hash of all sources, as CMakeLists.txt computes it; None in a wheel, which leaves them out."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".cpp", ".h"))
    each = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return hashlib.sha256(each.encode()).hexdigest() if files else None


@functools.cache
def _openmp() -> str | None:
    """Path of the OpenMP runtime that torch has loaded, its symbols made global; None if there is none."""
    maps = Path("/proc/self/maps")
    path = openmp_path(os.fsdecode(maps.read_bytes())) if maps.exists() else None
    if path is not None:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return path


def openmp_path(maps: str) -> str | None:
    """The OpenMP runtime among the files that a /proc/PID/maps lists: five columns, then a path, blanks and all."""
    found = re.search(r"^(?:\S+ +){5}(/(?:.*/)?lib[gi]?omp[^/\n]*\.so[^/\n]*)$", maps, re.MULTILINE)
    return found[1] if found else None
