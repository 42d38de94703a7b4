"""Peak memory, measured from outside: a fresh process loads or converts a folder and says what it needed at most."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leanseek.checkpoint import convert, save

# Each call runs in a fork of its own, whose peak begins with what the parent holds: torch, and no weights. A small load
# comes first: it brings 20 MB of torch's code into the fork's memory, which no weights need.
PROGRAM = """
import json, os, resource, sys
import torch
from leanseek.checkpoint import convert, load

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
for call in sys.argv[1:]:
    if not os.fork():
        load("small")
        before = peak()
        result = eval(call)
        needed = peak() - before
        weights = sum(tensor.nbytes for tensor in result.state_dict().values()) if result else 0
        print(json.dumps([needed, weights]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, call
"""


@pytest.fixture(scope="module")
def folders(network, tmp_path_factory) -> Path:
    """One model of about 50 M values, most of them experts, as float32 (sharded), BF16 and FP8."""
    folder = tmp_path_factory.mktemp("folders")
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 32, "num_hidden_layers": 3}
    save(network(**sizes), folder / "f32", max_shard_bytes=60_000_000)
    convert(folder / "f32", folder / "bf16", "bf16")
    convert(folder / "f32", folder / "fp8", "fp8")
    save(network(), folder / "small", "hf-fp8")
    return folder


def measure(folders: Path, *calls: str) -> dict[str, tuple[int, int]]:
    """Bytes that each call needed at its peak, and bytes of the weights it returned."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, "-c", PROGRAM, *calls]
    run = subprocess.run(command, cwd=folders, env=environment, capture_output=True, text=True, check=True)
    return {call: tuple(json.loads(line)) for call, line in zip(calls, run.stdout.splitlines(), strict=True)}


def test_loading_needs_little_more_than_the_weights(folders):
    """Not the file's pages beside the weights, not experts apart and stacked: either would be twice as much."""
    calls = ("load('f32')", "load('bf16')", "load('fp8')", "load('fp8', keep_fp8=True)")
    for call, (needed, weights) in measure(folders, *calls).items():
        assert weights > 50e6, call
        assert weights / 2 < needed < 1.05 * weights + 16 * 2**20, (call, needed, weights)


def test_converting_needs_the_memory_of_a_few_tensors(folders):
    for call, (needed, _) in measure(folders, "convert('fp8', 'a', 'bf16')", "convert('bf16', 'b', 'fp8')").items():
        assert 0 < needed < 24 * 2**20, (call, needed)  # of 100 MB in BF16
