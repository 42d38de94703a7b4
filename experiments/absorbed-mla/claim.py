"""One layer's attention over a cache of 512 to 32K tokens: MLA in both of its forms, MHA, GQA and MQA.

Shapes are those of bench-3b: 16 heads, 128 wide; GQA has 4 key heads. What grows with the context is timed, on one
thread in BF16, each as well as we know how to compute it:

    absorbed   the kernel of our engine over latents (ops.latent_attention), and the products with W_UK and W_UV
    expanded   W_UKV of all cached latents to keys and values of every head, then torch's fused attention
    MHA, GQA, MQA   the faster of torch's fused attention and our kernel, for which a key head is a sequence whose rows
                    are a value and a key; both read a key once for all the queries that share it. For a single query
                    torch.bmm, torch.mv and our linears reach no more bytes per second.

Left out are the projections that do not depend on the context. Decoding computes one new token; prefill, a chunk of 512
behind the others, as many as a step of our engine takes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek import ops
from leanseek.bench.machine import read_bandwidth
from leanseek.machine.device import preferred_dtype
from leanseek.pages import COLORS
from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import named
from leanseek.reproduce.results import Found, Interval, Run
from leanseek.training import RunConfig

HEADS, NOPE, ROPE, VALUE, LATENT = 16, 128, 64, 128, 512
WIDTH = LATENT + ROPE
KEY_HEADS = {"MHA": 16, "GQA": 4, "MQA": 1}
CONTEXTS = (512, 2048, 8192, 32768)
CHUNK = 512
SECONDS = 0.5  # of calls to take the median of
PAGE = 16
WALL = 0.5  # of the speed at the shortest context


def measure(run: RunConfig | None, folder: Path | None, quick: bool) -> dict[str, Any]:
    """Seconds and bytes of each form at each context, and the read bandwidth of that moment."""
    dtype, found = preferred_dtype(torch.device("cpu")), dict[str, Any]()
    for context in CONTEXTS[:3] if quick else CONTEXTS:
        for stage, rows in (("decode", 1), ("prefill", CHUNK)):
            for name, (calls, size) in _forms(context, rows, dtype).items():
                seconds = min(map(_median, calls))
                row = {"tokens_per_second": rows / seconds, "bytes": size, "bytes_per_second": size / seconds}
                found.setdefault(stage, {}).setdefault(name, {})[str(context)] = row
    return found | {"read_bytes_per_second": read_bandwidth("cpu"), "dtype": str(dtype).removeprefix("torch.")}


def _forms(context: int, rows: int, dtype: torch.dtype) -> dict[str, tuple[list[Callable[[], Tensor]], int]]:
    """By name: how the last `rows` of `context` tokens can attend to all, and the bytes of cache and weights read."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    size = dtype.itemsize
    cache, q = draw(context, WIDTH), draw(rows, HEADS, NOPE + ROPE)
    w_uk, w_uv = draw(HEADS, NOPE, LATENT) * LATENT**-0.5, draw(HEADS, VALUE, LATENT) * LATENT**-0.5
    index, mask, scale = _index(context, rows, 1), _mask(context, rows).to(dtype), (NOPE + ROPE) ** -0.5
    weights = (w_uk.numel() + w_uv.numel()) * size

    def absorbed() -> Tensor:
        with ops.row_invariant(), torch.inference_mode():
            own = torch.cat((ops.head_linear(q[..., :NOPE], w_uk), q[..., NOPE:]), dim=-1)
            out = ops.latent_attention(own, cache, index, scale, LATENT)
            return ops.head_linear(out, w_uv.transpose(1, 2)).transpose(0, 1)[:, None]

    w_ukv = torch.cat((w_uk, w_uv), dim=1).flatten(0, 1)  # [H · (nope + v), latent]

    def expanded() -> Tensor:
        with torch.inference_mode():
            kv = ops.linear(cache[:, :LATENT], w_ukv).view(context, HEADS, NOPE + VALUE)
            k = torch.cat((kv[..., :NOPE], cache[:, None, LATENT:].expand(-1, HEADS, -1)), dim=-1)
            v = F.pad(kv[..., NOPE:], (0, NOPE + ROPE - VALUE))  # torch's fused attention wants equal widths
            return _fused(q.transpose(0, 1)[:, None], k.transpose(0, 1), v.transpose(0, 1), mask, scale)[..., :VALUE]

    found: dict[str, tuple[list[Callable[[], Tensor]], int]] = {
        "MLA absorbed": ([absorbed], cache.numel() * size + weights),
        "MLA expanded": ([expanded], cache.numel() * size + weights),
    }
    for name, heads in KEY_HEADS.items():
        own, k, v = draw(heads, HEADS // heads, rows, NOPE), draw(heads, context, NOPE), draw(heads, context, VALUE)
        found[name] = _plain(own, k, v, mask), (k.numel() + v.numel()) * size
    return found


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> list[Callable[[], Tensor]]:
    """Two ways to compute attention of q [key heads, queries of each, n, width] over k and v [key heads, L, width]."""
    heads, group, rows, width = q.shape
    cache, index = torch.cat((v, k), dim=-1).flatten(0, 1), _index(k.shape[1], rows, heads)
    own = F.pad(q, (v.shape[-1], 0)).transpose(1, 2).flatten(0, 1)  # [key heads · n, queries, value + key]

    def fused() -> Tensor:
        with torch.inference_mode():
            return _fused(q, k, v, mask, width**-0.5)

    def kernel() -> Tensor:
        with ops.row_invariant(), torch.inference_mode():
            out = ops.latent_attention(own, cache, index, width**-0.5, v.shape[-1])
            return out.view(heads, rows, group, -1).transpose(1, 2)

    return [fused, kernel]


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [key heads, queries of each, n, width], k and v [key heads, L, width]; mask [n, L], added to the scores."""
    if q.shape[2] == 1:  # queries of a head as rows of one problem
        return F.scaled_dot_product_attention(q[:, :, 0][None], k[None], v[None], scale=scale)[0][:, :, None]
    k, v = (t[:, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _mask(context: int, rows: int) -> Tensor:
    return torch.full((rows, context), float("-inf")).triu(context - rows + 1)


def _index(context: int, rows: int, sequences: int) -> ops.CacheIndex:
    """Sequences of `context` tokens one behind another in the cache, the last `rows` of each new."""
    positions = torch.arange(context - rows, context).repeat(sequences)
    pages = torch.arange(sequences * context // PAGE).view(sequences, -1)
    offsets, lengths = torch.arange(sequences + 1) * rows, torch.full((sequences,), context)
    return ops.CacheIndex(positions, positions, offsets, lengths, pages, PAGE)


def _median(call: Callable[[], Tensor]) -> float:
    """Of a call; the first one warms up, unless it is long."""
    times: list[float] = []
    while not times or (times[0] < SECONDS and (len(times) < 4 or sum(times) < SECONDS)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


# ---- the verdict ----


def speed(stage: str, name: str, context: str) -> Callable[[Run], float]:
    return lambda run: run.measured[stage][name][context]["tokens_per_second"]


def ratio(found: Found, stage: str, other: str, context: str) -> Interval:
    """The absorbed form's speed over another's, repeat by repeat: a geometric mean, and its interval as factors."""
    own, others = speed(stage, "MLA absorbed", context), speed(stage, other, context)
    return Interval(*map(math.exp, found.mean("", lambda run: math.log(own(run) / others(run)))))


def spelled(factor: Interval) -> str:
    return f"{factor.mean:.1f} times ({factor.low:.1f} to {factor.high:.1f})"


def wall(found: Found, name: str) -> str:
    """The first context at which decoding has half the speed of the shortest."""
    contexts = list(_first(found)["decode"][name])
    speeds = {context: found.mean("", speed("decode", name, context)).mean for context in contexts}
    return next((f"{int(c):,}" for c in contexts if speeds[c] < WALL * speeds[contexts[0]]), f"beyond {contexts[-1]}")


def _first(found: Found) -> dict[str, Any]:
    return found.runs[""][found.seeds[0]].measured


def judge(found: Found) -> Verdict:
    longest = list(_first(found)["decode"]["MHA"])[-1]
    against = {name: ratio(found, "decode", name, longest) for name in KEY_HEADS}
    faster = [name for name, interval in against.items() if interval.low > 1]
    word = (
        "held" if {"MHA", "GQA"} <= set(faster)
        else "held in part" if "MHA" in faster
        else "contradicted" if against["MHA"].high < 1
        else "not seen at this scale"
    )  # fmt: skip
    sizes = {name: rows[longest]["bytes"] / 2**20 for name, rows in _first(found)["decode"].items()}
    ours = (
        f"At {int(longest):,} tokens the absorbed form decodes {spelled(against['MHA'])} as fast as MHA, "
        f"{spelled(against['GQA'])} as GQA with 4 key heads and {spelled(against['MQA'])} as MQA."
    )
    prefill = {name: spelled(ratio(found, "prefill", name, longest)) for name in (*KEY_HEADS, "MLA expanded")}
    shares = {
        name: found.mean("", lambda r, n=name: r.measured["decode"][n][longest]["bytes_per_second"]
                         / r.measured["read_bytes_per_second"])  # type: ignore[misc]
        for name in sizes
    }  # fmt: skip
    listed = {
        "sizes": ", ".join(f"{name} {size:.0f}" for name, size in sizes.items()),
        "walls": ", ".join(f"{name} {wall(found, name)}" for name in sizes),
        "shares": ", ".join(f"{name} {share.mean:.0%}" for name, share in shares.items()),
    }
    text = (
        "One layer of bench-3b's attention on one core, repeated instead of seeded. A decoded token reads, in MiB: "
        f"{listed['sizes']}. Half of the speed at 512 tokens is lost by: {listed['walls']}. Share of the core's read "
        f"bandwidth at {int(longest):,}: {listed['shares']}; on one core no form is at the memory's wall, and a better "
        f"kernel might bring MHA nearer. MLA is bound by arithmetic, as each latent is multiplied for all {HEADS} "
        "heads; so on a CPU few key heads decode as fast or faster, at whatever quality they have. A chunk of "
        f"{CHUNK} prompt tokens behind the rest runs {prefill['MHA']} as fast absorbed as with MHA, {prefill['GQA']} "
        f"as with GQA and {prefill['MLA expanded']} as with latents expanded. A cache in FP8 would take half of these "
        "bytes; our engine keeps it in BF16, so that was not timed."
    )
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    for ax, stage in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        for color, name in zip(COLORS, _first(found)[stage], strict=False):
            contexts = list(_first(found)[stage][name])
            values = [found.each("", speed(stage, name, context)) for context in contexts]
            x = [int(context) for context in contexts]
            ax.plot(
                x, [sum(v) / len(v) for v in values], color=color, linewidth=1.7, marker="o", markersize=3, label=name
            )
            ax.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.18)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks([int(c) for c in contexts], [f"{int(c):,}" for c in contexts])
        named(ax, "tokens in the cache", f"{stage}: tokens per second, one layer")
