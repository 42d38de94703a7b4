"""A dtype that torch emulates here is named, and what would take minutes in it is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leanseek.bench import generate, machine, train, workers

SIDE = {"tokens_per_second": 10.0, "activation_bytes_per_token": 1.0, "peak_memory_bytes": 1}


@pytest.fixture
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with these GEMM rates in float32 and BF16."""
    rates = dict(zip((torch.float32, torch.bfloat16), request.param, strict=True))
    monkeypatch.setattr(machine, "gemm_rate", lambda dtype, device: rates[dtype])
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e10)


@pytest.mark.parametrize(
    ("limits", "sides"),
    [((1e11, 3e8), ["float32"]), ((1e11, 2e11), ["float32", "autocast", "bfloat16"])],
    indirect=["limits"],
)
def test_training_leaves_out_a_peers_emulated_modes(
    limits: None, sides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def alternate(commands: dict[str, list[str]], *_: object) -> dict[str, dict[str, Any]]:
        asked.extend(commands)
        return {name: dict(SIDE) for name in commands}

    monkeypatch.setattr(train, "_alternate", alternate)
    found = train.bench_train("demo", 1, 8, 1, ["transformers"])
    assert asked == ["leanseek", "leanseek fp8", *(f"transformers {mode}" for mode in sides)]
    left_out = [mode for mode in train.PEER_MODES if mode not in sides]
    assert found["notes"] == [f"transformers {mode}: left out, torch emulates bfloat16 here" for mode in left_out]
    assert found["machine"]["emulated"] == (["bfloat16"] if left_out else [])


@pytest.mark.parametrize("limits", [(1.0, 2.0)], indirect=True)
def test_no_side_is_above_the_gemm_rate(limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else had the machine when it was probed."""
    monkeypatch.setattr(train, "_alternate", lambda sides, *_: {name: dict(SIDE) for name in sides})
    assert all(side["share_of_best_gemm"] == 1 for side in train.bench_train("demo", 1, 8, 1, [])["results"].values())


@pytest.mark.parametrize(
    ("limits", "fastest", "peers"),
    [((1e11, 3e8), "float32", ["llama.cpp q8_0", "llama.cpp bf16"]),
     ((1e11, 2e11), "bfloat16", ["llama.cpp q8_0", "llama.cpp bf16", "transformers bfloat16"])],
    indirect=["limits"],
)  # fmt: skip
def test_decoding_leaves_out_a_peers_emulated_mode(
    limits: None, fastest: str, peers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = dict.fromkeys(("decode_tokens_per_second", "prefill_tokens_per_second", "read_bytes_per_second"), 1.0)
    monkeypatch.setattr(generate, "_turns", lambda sides, context: {name: dict(side) for name in sides})
    monkeypatch.setattr(generate, "random_model", lambda *_: tmp_path)
    monkeypatch.setattr(generate, "export_gguf", lambda *_: None)
    found = generate.bench_generate("demo", ["llama.cpp", "transformers"], [16])
    assert [pair["peer"] for pair in found["peers"]] == peers
    assert all(f"share_of_{fastest}_gemm" in side for side in found["results"]["16"].values())
    assert len(found["notes"]) == 3 - len(peers)


def test_the_wheel_carries_the_peers_scripts() -> None:
    """The build puts benchmarks/peers where `workers.PEERS` looks first."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    inside = workers._INSIDE.relative_to(Path(train.__file__).parents[2])
    assert f'"{inside}" = "benchmarks/peers"' in text
    for name in ("llama_cpp_generate", "transformers_generate", "transformers_train", "vllm_serve"):
        assert Path(workers.peer_command(name)[1]).is_file()
