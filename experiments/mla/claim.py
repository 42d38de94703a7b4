"""MLA against MHA, GQA and MQA of as many parameters: quality beside the bytes that a token leaves in the cache."""

from __future__ import annotations

from leanseek import planning
from leanseek.config import ModelConfig
from leanseek.plotting import Figure
from leanseek.reproduce.cache import CONTEXT, served
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drawing import BITS, color, curves, named
from leanseek.reproduce.results import Found, bits

EQUAL = 0.01  # of MHA's bits per byte: "equal quality"


def judge(found: Found) -> Verdict:
    cache = {arm: planning.kv_bytes_per_token(run.model) for arm, run in found.claim.arms.items()}
    v3 = ModelConfig.preset("v3-671b")
    v3_saved = 1 - planning.kv_bytes_per_token(v3) / planning.kv_bytes_per_token_as(v3, v3.num_attention_heads)
    saved = 1 - cache["mla"] / cache["mha"]
    against = {arm: found.difference("mla", arm, bits) for arm in ("mha", "gqa", "mqa")}
    margin = EQUAL * found.mean("mha", bits).mean
    mha = against["mha"]
    if mha.high < margin:
        word = "held"
    elif mha.low > margin:
        word = "contradicted"
    else:
        word = "not seen at this scale"
    ours = (
        f"The cache is {saved:.1%} smaller than MHA's ({cache['mla']} and {cache['mha']} bytes per token; V3's own "
        f"{v3_saved:.1%}). Bits per byte: {found.listed(bits)}."
    )
    streams = ", ".join(f"{served(run.model)['streams_per_gib']:,.0f} ({arm})" for arm, run in found.claim.arms.items())
    text = (
        f"Four networks of 5.8 M parameters that differ in attention alone; more query heads make up for fewer key "
        f"heads. MLA's bits per byte less MHA's: {mha} (equal here means within {EQUAL:.0%}); less GQA's: "
        f"{against['gqa']}; less MQA's, which caches {cache['mqa']} bytes: {against['mqa']}. Streams of "
        f"{CONTEXT:,} tokens that a GiB of the engine's cache holds, by its own pages: {streams}."
    )
    return Verdict(word, ours, text)


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    for arm, run in found.claim.arms.items():
        values, x = found.each(arm, bits), planning.kv_bytes_per_token(run.model)
        left.scatter([x] * len(values), values, color=color(found, arm), s=26, label=arm, linewidths=0)
    left.set_xscale("log", base=2)
    left.set_xticks([512, 1024, 2048, 4096], ["512", "1,024", "2,048", "4,096"])
    named(left, "cache bytes per token", BITS)
    curves(right, found)
