"""Multi-token prediction: does it help the main loss, and are its drafts accepted?"""

from __future__ import annotations

from leanseek.config import ModelConfig
from leanseek.plotting import Figure
from leanseek.reproduce.claims import Verdict
from leanseek.reproduce.drafts import measure, memory_bound_speedup
from leanseek.reproduce.drawing import BITS, curves, dots
from leanseek.reproduce.results import Found, Interval, Run, bits

__all__ = ["draw", "judge", "measure"]

V3 = ModelConfig.preset("v3-671b")


def judge(found: Found) -> Verdict:
    one, two = (found.difference(arm, "off", bits) for arm in ("depth-1", "depth-2"))
    word = (
        "held" if one.sign < 0
        else "contradicted" if one.sign > 0
        else "not seen at this scale"
    )  # fmt: skip
    accepted = found.mean("depth-1", lambda run: run.measured["generation"]["greedy"]["acceptance"][0])
    agreed = {arm: _agreement(found, arm) for arm in ("depth-1", "depth-2")}
    speed = found.mean("depth-1", lambda run: _speed(run, "greedy"))
    deep = found.mean("depth-1", lambda run: run.measured["speedup"][str(V3.num_hidden_layers)])
    ours = f"Bits per byte of the main model: {found.listed(bits)}."
    ours += f" {accepted} of the drafts are accepted in greedy decoding."
    text = (
        f"The main model's bits per byte, depth 1 less off: {one}; depth 2 less off: {two}. On held-out text the "
        f"module agrees with the main model's own choice at {agreed['depth-1'][0]} of positions; of depth 2, "
        f"{agreed['depth-2'][0]} and, one further on, {agreed['depth-2'][1]}. Tokens per second with drafts over those "
        f"without, here: {speed}; of {V3.num_hidden_layers} layers such as these, computed from the measured parts and "
        f"the acceptance of sampled text: {deep}. Where reading weights is all that takes time, V3's 85 to 90 % give "
        f"{memory_bound_speedup(V3, 0.85):.2f} to {memory_bound_speedup(V3, 0.9):.2f}."
    )
    return Verdict(word, ours, text)


def _speed(run: Run, kind: str) -> float:
    rates = run.measured["generation"][kind]["tokens_per_second"]
    return float(rates["drafts"] / rates["plain"])


def _agreement(found: Found, arm: str) -> list[Interval]:
    depths = range(found.claim.arms[arm].model.num_nextn_predict_layers)
    return [found.mean(arm, lambda run, k=k: run.measured["agreement"][k]) for k in depths]  # type: ignore[misc]


def draw(figure: Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    dots(left, found, bits, BITS)
    curves(right, found)
