"""`leanseek bench kernels` measures what it says, at a size that takes a second."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from leanseek.bench import kernels
from leanseek.cli import app


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"device": "this one", "threads": 1, "torch": torch.__version__, "gemm_flops_bfloat16": 1e11}
    limits |= {"emulated": []}
    monkeypatch.setattr(kernels, "machine", lambda: limits)
    monkeypatch.setattr(kernels, "ROUNDS", 2)


def test_every_case_has_its_speed_and_its_share_of_the_limit() -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", "--size", "128", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    results = found["results"]
    assert found["size"] == 128 and found["paths"] and results["copy"]["share_of_copy"] == 1.0
    products = [r for r in results.values() if "flops_per_second" in r]
    moves = [r for r in results.values() if "bytes_per_second" in r]
    assert len(products) >= 3 and len(moves) >= 5 and len(products) + len(moves) == len(results)
    for result in products:
        assert math.isclose(result["share_of_gemm"], result["flops_per_second"] / 1e11)
    for result in moves:
        assert math.isclose(result["share_of_copy"], result["bytes_per_second"] / results["copy"]["bytes_per_second"])
    compared = [r for r in results.values() if "against" in r]
    assert compared and all(
        math.isclose(r["speed_ratio"], results[r["against"]]["seconds"] / r["seconds"]) for r in compared
    )


def test_a_person_sees_a_line_a_case() -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", "--size", "128"])
    assert done.exit_code == 0 and "this one" in done.stdout and "of GEMM" in done.stdout
    assert sum("of copy" in line for line in done.stdout.splitlines()) >= 4


@pytest.mark.parametrize("size", [128, 4096, 8192])
def test_v3s_widths_shrink_with_the_size_and_never_grow(size: int) -> None:
    wide, narrow, dense = kernels._widths(size, 7168, 2048, 18432)
    assert all(width % 128 == 0 for width in (wide, narrow, dense))
    assert (wide, narrow, dense) == {128: (128, 128, 512)}.get(size, (7168, 2048, 18432))


def test_cases_take_turns_and_the_first_turn_is_not_counted() -> None:
    order: list[str] = []
    cases = [kernels.Case(n, lambda n=n: order.append(n), flops=1.0) for n in ("a", "b")]
    kernels._take_turns(cases, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3


@pytest.mark.gpu
def test_the_gpu_cases_name_the_path_that_ran() -> None:
    found = kernels.bench_kernels(256, rounds=1)
    paths = [r["path"] for r in found["results"].values() if "path" in r]
    assert len(paths) == 8 and set(paths) <= {"triton", "hopper", "cublaslt", "deepgemm"}
