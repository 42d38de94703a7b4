"""How good a network's drafts are, and what they bring: on held-out text, in the engine, and for a deeper network."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from leanseek import planning
from leanseek.backends import backend_of
from leanseek.checkpoint import load
from leanseek.config import ModelConfig
from leanseek.data.loader import TokenDataset
from leanseek.engine import LLM, SamplingParams
from leanseek.machine.device import preferred_dtype
from leanseek.ops import CacheIndex
from leanseek.training import RunConfig

PROMPT, NEW = 64, 96  # tokens of a request
PROMPTS, TURNS = 8, 3
CONTEXT = 128  # tokens before those whose parts are timed
TIMED = 200  # steps
BATCH = 16


def measure(run: RunConfig, folder: Path, quick: bool = False) -> dict[str, Any]:
    """Of a run that has ended: `agreement` and `generation` for one that has MTP modules, with the speed that its parts
    would give at other depths; else the tokens per second alone."""
    found: dict[str, Any] = {"generation": generation(run, folder, PROMPTS // 4 if quick else PROMPTS)}
    if run.model.num_nextn_predict_layers:
        parts, accepted = step_parts(folder), found["generation"]["sampled"]["acceptance"][0]
        layers = run.model.num_hidden_layers, ModelConfig.preset("v3-671b").num_hidden_layers
        found |= {
            "agreement": agreement(run, folder), "parts": parts._asdict(),
            "speedup": {str(n): parts.speedup(run.model.num_hidden_layers, n, accepted) for n in layers},
        }  # fmt: skip
    return found


# ---- on held-out text ----


@torch.no_grad()
def agreement(run: RunConfig, folder: Path, sequences: int | None = None) -> list[float]:
    """How often MTP module k chooses the token that the main model chooses k tokens later, both reading the text of the
    validation split: a share for each depth."""
    model, dtype = load(folder, dtype="float32"), preferred_dtype(torch.device("cpu"))
    length, depths = run.data.seq_len, run.model.num_nextn_predict_layers
    data = TokenDataset(Path(run.data.path), "validation", length, run.model.lookahead)
    hits, seen = [0] * depths, [0] * depths
    for batch in data.in_order(BATCH, sequences or run.train.eval_sequences):
        hidden, _ = model.hidden(batch.tokens[:, : data.seq_len], dtype=dtype)
        states, _ = model.predict_ahead(hidden, batch.tokens[:, 1:])
        main = model.head(hidden).argmax(-1)  # [B, T], of the token after each position
        for k, state in enumerate(states, start=1):
            drafts = model.head(state).argmax(-1)[:, : data.seq_len - k]  # of the token k after that
            hits[k - 1] += int((drafts == main[:, k:]).sum())
            seen[k - 1] += drafts.numel()
    return [hit / of for hit, of in zip(hits, seen, strict=True)]


# ---- in the engine ----


def generation(run: RunConfig, folder: Path, prompts: int = PROMPTS) -> dict[str, Any]:
    """One request after another through the engine, prompts from the validation split, greedy and sampled (at
    temperature 1): tokens per second without drafts and with, by turns, and the engine's own count of the accepted
    ones by position. The engine drafts as long as that pays."""
    data = TokenDataset(Path(run.data.path), "validation", PROMPT)
    windows = [batch.tokens[0, :PROMPT].tolist() for batch in data.in_order(1, prompts)]
    options = {"dtype": preferred_dtype(torch.device("cpu")), "cache_gib": 0.125, "packed_copy": False}
    depths = run.model.num_nextn_predict_layers
    found: dict[str, Any] = {}
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        plain = LLM(folder, speculate=0, prefix_cache=False, **options)
        sides = {"plain": plain}
        if depths:
            sides["drafts"] = LLM(folder, speculate=depths, prefix_cache=False, **options)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(TURNS + 1):
            for name, llm in sides.items():
                rate = _rate(llm, windows, temperature)
                if turn:  # the first one warms up
                    rates[name].append(rate)
        found[kind] = {"tokens_per_second": {name: statistics.median(each) for name, each in rates.items()}}
        if depths:
            stats = sides["drafts"].engine.stats()
            counts = zip(stats.accepted_tokens, stats.draft_tokens, strict=True)
            found[kind]["acceptance"] = [accepted / max(1, proposed) for accepted, proposed in counts]
            found[kind]["steps_with_drafts"] = stats.draft_tokens[0] / stats.steps
    return found


def _rate(llm: LLM, prompts: list[list[int]], temperature: float) -> float:
    """New tokens per second of time in which only new tokens are computed."""
    tokens, seconds = 0, 0.0
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=NEW, ignore_eos=True)
        (request,) = llm.generate([prompt], params)
        timing = request.outputs[0].timing
        tokens, seconds = tokens + NEW - 1, seconds + timing.finished - timing.first_token
    return tokens / seconds


# ---- parts of a step, and what they would give ----


class Parts(NamedTuple):
    """Seconds of one sequence's step: all layers and the head for one new token, and for two; and the MTP module with
    its head, that makes a draft."""

    layers: float
    head: float
    layers_of_two: float
    head_of_two: float
    draft: float

    def speedup(self, own: int, layers: int, acceptance: float) -> float:
        """Tokens per second with one draft a step over those without, of a network that has `layers` layers in place
        of its `own`: 1 + acceptance tokens a step that verifies two rows and makes the next draft."""
        more = layers / own
        plain = more * self.layers + self.head
        return (1 + acceptance) * plain / (more * self.layers_of_two + self.head_of_two + self.draft)


def step_parts(folder: Path) -> Parts:
    """Medians of `TIMED` steps behind `CONTEXT` tokens, on the threads of this process."""
    model = load(folder, dtype=preferred_dtype(torch.device("cpu"))).requires_grad_(False)
    backend, config = backend_of(model), model.config
    slots = CONTEXT + 16
    cache = torch.zeros(config.num_hidden_layers + 1, slots, config.cache_width, dtype=backend.dtype)
    one, two = (_index(rows, slots) for rows in (1, 2))
    tokens = torch.arange(2)
    with torch.inference_mode():
        backend.step(torch.zeros(CONTEXT, dtype=torch.int64), cache, _index(CONTEXT, slots, before=0))
        hidden = backend.step(tokens, cache, two).clone()

        def draft() -> None:
            backend.logits(backend.step_ahead(1, hidden[:1], tokens[:1], cache, one))

        timed: dict[str, Callable[[], object]] = {
            "layers": lambda: backend.step(tokens[:1], cache, one),
            "head": lambda: backend.logits(hidden[:1]),
            "layers_of_two": lambda: backend.step(tokens, cache, two),
            "head_of_two": lambda: backend.logits(hidden),
            "draft": draft,
        }
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(TIMED):  # by turns: the machine's other work meets all of them
            for name, part in timed.items():
                start = time.perf_counter()
                part()
                seconds[name].append(time.perf_counter() - start)
    return Parts(**{name: statistics.median(each) for name, each in seconds.items()})


def _index(rows: int, slots: int, before: int = CONTEXT) -> CacheIndex:
    """One sequence that has `before` tokens and gets `rows` more."""
    places = torch.arange(before, before + rows)
    return CacheIndex(
        places, places, torch.tensor([0, rows]), torch.tensor([before + rows]), torch.arange(slots // 16)[None], 16
    )


def memory_bound_speedup(config: ModelConfig, acceptance: float) -> float:
    """The most that one draft a step can bring where a step takes as long as its weights take to be read, and a second
    row costs nothing: 1 + acceptance tokens for the main model's activated weights and the MTP module's with its head.

    V3 with its published 85 to 90 %: 1.77 to 1.82; the paper measured 1.8.
    """
    c = dataclasses.replace(config, num_nextn_predict_layers=0)
    main = planning.activated_parameters(c) - c.vocab_size * c.hidden_size  # the embedding is a look-up
    more = planning.train_flops_per_token(dataclasses.replace(c, num_nextn_predict_layers=1), 0)
    module = (more - planning.train_flops_per_token(c, 0)) / 6
    return (1 + acceptance) * main / (main + module)
