"""A second DeepSeek-V3, written for reading: float64, one head, one token, one expert at a time, from the report.

It shares no code with leanseek.model and leanseek.ops. Also here: a driver that feeds `Transformer.step` through a
paged cache as a server would, and the smallest margin by which a router decided.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from leanseek.config import ModelConfig
from leanseek.model import Route, Transformer
from leanseek.ops import CacheIndex


class Oracle:
    """The network of a `Transformer`'s config and weights; sequences go through it one at a time."""

    def __init__(self, model: Transformer):
        self.c: ModelConfig = model.config
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.routes: dict[int, list[list[int]]] = {}  # layer -> experts of each token of the last sequence

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, V]."""
        return self.hidden(tokens) @ self.head.T

    @property
    def head(self) -> Tensor:
        return self.w["embed_tokens.weight" if self.c.tie_word_embeddings else "lm_head.weight"]

    def hidden(self, tokens: Tensor) -> Tensor:
        self.routes = {}
        x = self.w["embed_tokens.weight"][tokens]
        for layer in range(self.c.num_hidden_layers):
            x = self.block(x, f"layers.{layer}.", layer)
        return self.norm(x, "norm.weight")

    def ahead(self, tokens: Tensor, length: int) -> list[Tensor]:
        """Hidden states of MTP depths 1 to D for tokens [length + D] (eq. 21, 22), each [length, D]."""
        h, states = self.hidden(tokens[:length]), []
        for k in range(1, self.c.num_nextn_predict_layers + 1):
            p = f"mtp.{k - 1}."
            joined = []
            for i in range(length):
                embedded = self.w["embed_tokens.weight"][tokens[i + k]]
                # the published order, the reverse of eq. 21's; h is taken after its norm
                pair = (self.norm(embedded, p + "enorm.weight"), self.norm(h[i], p + "hnorm.weight"))
                joined.append(self.w[p + "eh_proj.weight"] @ torch.cat(pair))
            h = self.block(torch.stack(joined), p + "block.", self.c.num_hidden_layers + k - 1)
            h = self.norm(h, p + "norm.weight")
            states.append(h)
        return states

    def block(self, x: Tensor, p: str, layer: int) -> Tensor:
        attend = self.mla if self.c.attention == "mla" else self.gqa
        x = x + attend(self.norm(x, p + "input_layernorm.weight"), p + "self_attn.")
        return x + self.feed_forward(self.norm(x, p + "post_attention_layernorm.weight"), p + "mlp.", layer)

    def norm(self, x: Tensor, weight: str, eps: float | None = None) -> Tensor:
        eps = self.c.rms_norm_eps if eps is None else eps
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * self.w[weight]

    # ---- positions ----

    def frequency(self, pair: int) -> float:
        dim, theta, yarn = self.c.rope_dim, self.c.rope_theta, self.c.rope_scaling
        plain = theta ** (-2 * pair / dim)
        if yarn is None:
            return plain

        def boundary(turns: float) -> float:  # the pair that turns so often within the original context
            return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(boundary(yarn.beta_fast)), 0), min(math.ceil(boundary(yarn.beta_slow)), dim - 1)
        ramp = float(pair > low) if low == high else min(max((pair - low) / (high - low), 0.0), 1.0)
        return plain * (1 - ramp) + plain / yarn.factor * ramp

    def rope(self, x: Tensor) -> Tensor:
        """x [T, R], rotated in place: pair i of token t by the angle t · frequency(i)."""
        out, half, yarn = x.clone(), x.shape[-1] // 2, self.c.rope_scaling
        magnitude = 1.0
        if yarn is not None:
            m = lambda scale: 0.1 * scale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0  # noqa: E731
            magnitude = m(yarn.mscale) / m(yarn.mscale_all_dim) if yarn.mscale and yarn.mscale_all_dim else m(1.0)
            magnitude = magnitude if yarn.attention_factor is None else yarn.attention_factor
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if self.c.rope_interleave else (i, i + half)
            angle = torch.arange(x.shape[0], dtype=torch.float64) * self.frequency(i)
            out[:, a] = (x[:, a] * angle.cos() - x[:, b] * angle.sin()) * magnitude
            out[:, b] = (x[:, b] * angle.cos() + x[:, a] * angle.sin()) * magnitude
        return out

    def scale(self, width: int) -> float:
        yarn = self.c.rope_scaling
        m = 1.0
        if yarn is not None and yarn.mscale_all_dim and yarn.factor > 1:
            m = 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1.0
        return m * m / math.sqrt(width)

    # ---- attention ----

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One head, causal: q, k [T, dk], v [T, dv]."""
        scores = (q @ k.T) * self.scale(q.shape[-1])
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1) @ v

    def mla(self, x: Tensor, p: str) -> Tensor:
        c, w = self.c, self.w
        nope, v_dim = c.qk_nope_head_dim, c.v_head_dim
        if c.q_lora_rank is None:
            queries = x @ w[p + "q_proj.weight"].T
        else:
            latent = self.norm(x @ w[p + "q_a_proj.weight"].T, p + "q_a_layernorm.weight", 1e-6)
            queries = latent @ w[p + "q_b_proj.weight"].T  # eq. 6 to 9
        down = x @ w[p + "kv_a_proj_with_mqa.weight"].T  # eq. 1, 3
        latent = self.norm(down[:, : c.kv_lora_rank], p + "kv_a_layernorm.weight", 1e-6)
        shared_key = self.rope(down[:, c.kv_lora_rank :])
        up = latent @ w[p + "kv_b_proj.weight"].T  # eq. 2, 5
        heads = []
        for h in range(c.num_attention_heads):
            q = queries[:, h * c.qk_head_dim : (h + 1) * c.qk_head_dim]
            kv = up[:, h * (nope + v_dim) : (h + 1) * (nope + v_dim)]
            q = torch.cat((q[:, :nope], self.rope(q[:, nope:])), -1)
            k = torch.cat((kv[:, :nope], shared_key), -1)  # eq. 4
            heads.append(self.attend(q, k, kv[:, nope:]))  # eq. 10
        return torch.cat(heads, -1) @ w[p + "o_proj.weight"].T  # eq. 11

    def gqa(self, x: Tensor, p: str) -> Tensor:
        width, shared = self.c.gqa_head_dim, self.c.num_attention_heads // self.c.kv_heads
        q, k, v = (x @ self.w[f"{p}{name}_proj.weight"].T for name in "qkv")
        heads = []
        for h in range(self.c.num_attention_heads):
            mine, theirs = (slice(i * width, (i + 1) * width) for i in (h, h // shared))
            heads.append(self.attend(self.rope(q[:, mine]), self.rope(k[:, theirs]), v[:, theirs]))
        return torch.cat(heads, -1) @ self.w[p + "o_proj.weight"].T

    # ---- feed-forward ----

    def swiglu(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g = x @ gate.T
        return (g / (1 + torch.exp(-g)) * (x @ up.T)) @ down.T

    def mlp(self, x: Tensor, p: str) -> Tensor:
        return self.swiglu(x, *(self.w[f"{p}{name}_proj.weight"] for name in ("gate", "up", "down")))

    def feed_forward(self, x: Tensor, p: str, layer: int) -> Tensor:
        c = self.c
        dense = not c.n_routed_experts or layer < c.first_k_dense_replace or layer % c.moe_layer_freq
        if dense:
            return self.mlp(x, p)
        self.routes[layer] = []
        rows = [self.routed(token, p, layer) for token in x]  # eq. 12
        out = torch.stack(rows)
        return out + self.mlp(x, p + "shared_experts.") if c.n_shared_experts else out

    def routed(self, u: Tensor, p: str, layer: int) -> Tensor:
        c = self.c
        logits = self.w[p + "gate.weight"] @ u
        s = torch.sigmoid(logits) if c.scoring_func == "sigmoid" else torch.softmax(logits, 0)  # eq. 15
        chosen = self.choose(s, p)
        self.routes[layer].append(chosen)
        total = sum(float(s[e]) for e in chosen) if c.norm_topk_prob else 1.0  # eq. 13
        out = torch.zeros_like(u)
        for e in chosen:
            gate, up = self.w[p + "experts.gate_up_proj"][e].chunk(2)
            down = self.w[p + "experts.down_proj"][e]
            out += float(s[e]) / total * c.routed_scaling_factor * self.swiglu(u, gate, up, down)
        return out

    def choose(self, s: Tensor, p: str) -> list[int]:
        """eq. 14, 16 and node-limited routing."""
        c = self.c
        value = s + self.w[p + "gate.e_score_correction_bias"] if c.topk_method == "noaux_tc" else s
        size = c.n_routed_experts // c.n_group
        reach = list(range(c.n_routed_experts))
        if c.topk_method != "greedy" and c.n_group > 1:
            best = 2 if c.topk_method == "noaux_tc" else 1
            groups = [sorted(value[g * size : (g + 1) * size].tolist())[-best:] for g in range(c.n_group)]
            kept = sorted(range(c.n_group), key=lambda g: sum(groups[g]))[-c.topk_group :]
            reach = [e for e in reach if e // size in kept]
        return sorted(sorted(reach, key=lambda e: float(value[e]))[-c.num_experts_per_tok :])


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle


def _relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture
def relative() -> Callable[[Tensor, Tensor], float]:
    """relative(ours, theirs) = max |ours - theirs| / max |theirs|."""
    return _relative


def _smallest_margin(model: Transformer, routes: Sequence[Route]) -> float:
    """How near any choice of a group or an expert was to falling the other way, in units of s + b."""
    c, margin = model.config, float("inf")
    gates = {m.layer: m for m in model.modules() if hasattr(m, "e_score_correction_bias")}
    for route in routes:
        bias = gates[route.layer].e_score_correction_bias
        value = route.scores if bias is None else route.scores + bias
        if c.grouped_routing and c.topk_group < c.n_group:
            grouped = value.unflatten(1, (c.n_group, -1)).sort(-1, descending=True).values
            group = grouped[..., : 2 if c.selection_bias else 1].sum(-1)
            ranked = group.sort(-1, descending=True)
            margin = min(margin, float((ranked.values[:, c.topk_group - 1] - ranked.values[:, c.topk_group]).min()))
            mask = torch.ones_like(group, dtype=torch.bool).scatter_(1, ranked.indices[:, : c.topk_group], False)
            value = value.unflatten(1, (c.n_group, -1)).masked_fill(mask[..., None], float("-inf")).flatten(1)
        ranked_value = value.sort(-1, descending=True).values
        if c.num_experts_per_tok < ranked_value.shape[1]:
            gap = ranked_value[:, c.num_experts_per_tok - 1] - ranked_value[:, c.num_experts_per_tok]
            margin = min(margin, float(gap.min()))
    return margin


def _decided(model: Transformer, batch: int, length: int) -> Tensor:
    """Tokens [batch, length] that no router is in doubt about, so that rounding cannot change the experts."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
        with torch.no_grad():
            hidden, routes = model.hidden(tokens)
            if model.mtp:
                depth = len(model.mtp)
                routes += model.predict_ahead(hidden[:, : length - depth], tokens[:, 1:])[1]
        if _smallest_margin(model, routes) > 1e-4:
            return tokens
    raise AssertionError("every seed has a token between two experts")


@pytest.fixture
def decided() -> Callable[[Transformer, int, int], Tensor]:
    return _decided


class Server:
    """Feeds sequences through `Transformer.step` as a server would: a paged cache, pages in shuffled order."""

    def __init__(self, model: Transformer, sequences: int, longest: int, page_size: int = 4):
        self.model, self.page_size = model, page_size
        pages = -(-longest // page_size)
        shuffled = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(5))
        self.pages = shuffled.view(sequences, pages)
        c = model.config
        # whatever lies in unwritten rows must not be read: make it loud
        layers = c.num_hidden_layers + c.num_nextn_predict_layers
        self.cache = torch.full((layers, sequences * pages * page_size, c.cache_width), 1e3)
        self.lengths = [0] * sequences

    def index(self, counts: dict[int, int], before: dict[int, int]) -> CacheIndex:
        """The next counts[s] tokens of each sequence s, of which before[s] are in the cache."""
        positions = [torch.arange(before[s], before[s] + n) for s, n in counts.items()]
        slots = [self.pages[s][at // self.page_size] * self.page_size + at % self.page_size
                 for s, at in zip(counts, positions, strict=True)]  # fmt: skip
        return CacheIndex(
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            row_offsets=torch.tensor([0, *counts.values()]).cumsum(0),
            lengths=torch.tensor([before[s] + n for s, n in counts.items()]),
            pages=self.pages[list(counts)],
            page_size=self.page_size,
        )

    @torch.no_grad()
    def feed(self, sequences: Sequence[Tensor], chunks: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hidden states [len, D] of each sequence, fed chunks[s][0], chunks[s][1], ... tokens a step.

        A chunk of 0 leaves the sequence out of that step; past its chunks it gets one token a step.
        """
        outputs: list[list[Tensor]] = [[] for _ in sequences]
        step = 0
        while any(done < len(tokens) for done, tokens in zip(self.lengths, sequences, strict=True)):
            counts = {}
            for s, tokens in enumerate(sequences):
                wanted = chunks[s][step] if step < len(chunks[s]) else 1
                if n := min(wanted, len(tokens) - self.lengths[s]):
                    counts[s] = n
            step += 1
            new = torch.cat([sequences[s][self.lengths[s] : self.lengths[s] + n] for s, n in counts.items()])
            hidden = self.model.step(new, self.cache, self.index(counts, dict(enumerate(self.lengths))))
            for s, part in zip(counts, hidden.split(list(counts.values())), strict=True):
                outputs[s].append(part)
                self.lengths[s] += part.shape[0]
        return [torch.cat(parts) for parts in outputs]


@pytest.fixture
def server() -> type[Server]:
    return Server
