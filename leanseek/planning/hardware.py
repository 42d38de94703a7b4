"""GPUs and their links: one table, with where each figure comes from. Rates are per second, sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from leanseek.config import ConfigError
from leanseek.reading import shorten

GiB, GB, TFLOP = 2**30, 10**9, 10**12


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of `node` of its kind, with a network adapter each."""

    name: str
    bf16: float  # dense products, FLOP/s (data sheets, without sparsity)
    fp8: float  # 0: has none
    fp32: float  # outside the tensor cores
    memory: int  # as torch reports it
    bandwidth: float  # of the memory
    nvlink: float  # one way, as measured by an exchange of experts' rows
    network: float  # one way, line rate
    sms: int
    price: float  # $ an hour
    node: int = 8


# Peaks, memory and bandwidth: NVIDIA's data sheets (H100, H200, A100, HGX B200), as collected in
# stas00/ml-engineering, compute/accelerator. The H800 is an H100 with 400 GB/s of NVLink (both ways together).
# Memory: what torch reports on an H100 and an H200; B200: pytorch/ao#4002, with its bandwidth.
# NVLink: H800 153 to 158 GB/s and B200 726 GB/s (DeepEP, EP8); H20, which has the H100's links, 337 GB/s
# (DeepEP#16), which is 0.75 of the line rate; A100: the same share of its 300 GB/s.
# Network: ConnectX-7 400 Gb/s a GPU (DeepSeek's cluster, DGX H100 and B200), A100 ConnectX-6 200 Gb/s.
# Price: the H800's is the paper's (table 1). The others are typical rents of 2026 and move: `--price` replaces them.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312 * TFLOP, 0, 19.5 * TFLOP, 79 * GiB, 2039 * GB, 225 * GB, 25 * GB, 108, 1.30),
        Gpu("h800", 989 * TFLOP, 1979 * TFLOP, 67 * TFLOP, 79 * GiB, 3350 * GB, 155 * GB, 50 * GB, 132, 2.00),
        Gpu("h100", 989 * TFLOP, 1979 * TFLOP, 67 * TFLOP, 79 * GiB, 3350 * GB, 337 * GB, 50 * GB, 132, 2.65),
        Gpu("h200", 989 * TFLOP, 1979 * TFLOP, 67 * TFLOP, 139 * GiB, 4800 * GB, 337 * GB, 50 * GB, 132, 3.20),
        Gpu("b200", 2250 * TFLOP, 4500 * TFLOP, 75 * TFLOP, 178 * GiB, 7672 * GB, 726 * GB, 50 * GB, 148, 4.60),
    )
}


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError for a name that is not in the table; the message lists them."""
    if name.lower() not in GPUS:
        raise ConfigError(f"no GPU {shorten(repr(name))} in the table; there are {', '.join(GPUS)}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Shares:
    """Which share of its peak a GPU reaches in each kind of work.

    Measured with leanseek's kernels on an H100 (benchmarks/results/kernels-h100.json and, for attention,
    train-profile-bench-1b-h100.txt) and taken for every GPU of the table. None was fitted to a training run.
    """

    forward: float  # products of linears, and their input gradients
    weight: float  # their weight gradients
    experts: float  # grouped products
    experts_weight: float


SHARES = {
    "bf16": Shares(776 / 989, 737 / 989, 702 / 989, 694 / 989),
    "fp8": Shares(1248 / 1979, 904 / 1979, 921 / 1979, 697 / 1979),
}
ATTENTION, ATTENTION_BACKWARD = 538 / 989, 307 / 989  # cuDNN at 2,048 tokens, 192 and 128 wide; backward counted as 2x
FLOAT32 = 51 / 67  # the gate
MEMORY = 2889 / 3350  # a copy; quantisers reach 0.86 to 0.99 of it, norms 0.83 to 0.97
NETWORK = 0.87  # DeepEP at EP32 and EP64, less the copies that stay on their node
EXCHANGE_SMS = 20  # multiprocessors that exchange while the others compute (3.2.2)
UNHIDDEN = 0.04  # of an exchange beside the compute of the other direction: profile-data, 96 % hidden
