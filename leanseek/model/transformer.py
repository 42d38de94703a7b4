"""The Transformer: the story starts here.

tokens -> embedding -> blocks (attention.py, moe.py) -> norm -> head; MTP modules (mtp.py) go on from the last hidden.
Two ways through: `forward` over whole sequences (training, evaluation), `step` over new tokens with a cache (serving).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn

from leanseek import ops
from leanseek.config import ConfigError, ModelConfig
from leanseek.model.block import Block
from leanseek.model.layers import Embedding, Head, Linear, RMSNorm, next_token_loss
from leanseek.model.moe import Experts, Route
from leanseek.model.mtp import MTPModule
from leanseek.model.packing import Lengths, positions, within
from leanseek.model.rope import Rotary


class Stage(NamedTuple):
    """A part of a network: some layers, with the embedding before them where it is the first part, and the final norm,
    the head and the MTP modules after them where it is the last."""

    layers: range
    first: bool
    last: bool


class Output(NamedTuple):
    """What a forward with targets gives."""

    hidden: Tensor | None  # [B, T, D], the input of the next stage; None from the last
    losses: list[Tensor]  # from the last stage, float32 scalars: of the next token, then of each MTP depth
    routes: list[Route]  # of this stage's MoE layers, the MTP modules' included


class _Options(TypedDict):
    recompute: bool
    replay: Mapping[int, Tensor] | None
    lengths: Lengths | None


class Layers(nn.ModuleList):
    """The blocks of a stage under their numbers in the whole network: `layers[30]`, "layers.30.self_attn…"."""

    def __init__(self, blocks: Mapping[int, nn.Module]):
        super().__init__()
        for number, block in blocks.items():
            self.add_module(str(number), block)

    def __getitem__(self, number: int) -> nn.Module:  # type: ignore[override]
        return self.get_submodule(str(number))


class Transformer(nn.Module):
    """A network of the DeepSeek-V3 family, or some `stages` of one. Weights are uninitialised until `init_weights` or a
    checkpoint.

    The last stage holds the embedding too where MTP modules or a tied head read it: its gradient is then the sum of
    both stages', unless one Transformer holds both, the first and the last, as in a V-shaped pipeline (3.2.2).
    experts: the numbers of the routed experts that every MoE layer holds here, of all of them by default.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        stages: Sequence[Stage] = (),
        experts: range | None = None,
    ):
        super().__init__()
        self.config = config
        self.stages = tuple(stages) or (Stage(range(config.num_hidden_layers), first=True, last=True),)
        first, last = any(s.first for s in self.stages), any(s.last for s in self.stages)
        tied, depths = config.tie_word_embeddings, config.num_nextn_predict_layers if last else 0
        if first or depths or (last and tied):
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device, dtype)
        held = [i for stage in self.stages for i in stage.layers]
        self.layers = Layers({i: Block(config, i, device, dtype, experts) for i in held})
        if last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
            headless = tied or config.num_labels
            self.lm_head = None if headless else Head(config.hidden_size, config.vocab_size, device, dtype)
            if config.num_labels:  # a reward model (5.2.1): a scalar for each position, read at the last
                self.score = Linear(config.hidden_size, config.num_labels, device, dtype, high_precision=True)
        self.mtp = nn.ModuleList(MTPModule(config, k, device, dtype, experts) for k in range(depths))
        self.rotary = Rotary(config, device)

    @torch.no_grad()
    def init_weights(self, seed: int) -> Transformer:
        """Normal weights with std `initializer_range` (4.2), norms at one, balancing biases at zero; returns self.

        Each tensor, and each expert of a stack, is drawn by itself from (seed, name): a part of the network, or a rank
        that holds some of the experts, draws what the whole would.
        """
        stacks = {p: m.numbers for m in self.modules() if isinstance(m, Experts) for p in m.parameters()}
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            numbers = stacks.get(parameter)
            matrices = [(0, parameter)] if numbers is None else zip(numbers, parameter, strict=True)
            for number, matrix in matrices:
                key = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
                generator = torch.Generator(matrix.device).manual_seed(int.from_bytes(key))
                matrix.normal_(0.0, self.config.initializer_range, generator=generator)
        for name, buffer in self.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
        return self

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, D]: the output head, which is the embedding when tied.

        Raises:
            ConfigError: this is a reward model, which has none.
        """
        if self.config.num_labels:
            raise ConfigError("a reward model scores texts and writes none: it has a score in place of an output head")
        return self.embed_tokens.weight if self.lm_head is None else cast(Tensor, self.lm_head.weight)

    def head(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """hidden [..., D] after the final norm -> logits [..., vocab_size]; with targets [...] int64 their mean
        loss, a float32 scalar, or with weights [...] the weighted sum. Of a reward model -> scores [..., 1]."""
        if self.lm_head is not None:
            return self.lm_head(hidden, targets, weights)
        if self.config.num_labels and targets is None:
            return self.score(hidden)
        weight = self.head_weight
        return ops.linear(hidden, weight) if targets is None else next_token_loss(hidden, weight, targets, weights)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        replay: Mapping[int, Tensor] | None = None,
        lengths: Lengths | None = None,
        stage: int = 0,
    ) -> Tensor | Output:
        """tokens [B, T] int64 -> logits [B, T, vocab_size]; with `targets`, for training, an Output.

        targets [B, T + D] int64: the tokens after each position, D more than there are positions for the MTP modules.
        With weights [B, T + D] float32, one for each target, losses are weighted sums, else means. No target lies in
        another sample.
        `stage` says which of the stages held here runs. One that is not the first takes the hidden state [B, T, D] of
        the one before in place of tokens, and one that is not the last gives its hidden state in place of logits.
        Options as in `hidden`.
        """
        options: _Options = {"recompute": recompute, "replay": replay, "lengths": lengths}
        hidden, routes = self.hidden(tokens, dtype=dtype, stage=stage, **options)
        last = self.stages[stage].last
        if targets is None:
            return self.head(hidden) if last else hidden
        if not last:
            return Output(hidden, [], routes)

        def loss(depth: int, state: Tensor) -> Tensor:
            places = slice(depth, depth + state.shape[1])
            own = None if weights is None else within(lengths, weights[:, places], depth + 1)
            return self.head(state, targets[:, places], own)

        losses = [loss(0, hidden)]
        states, more = self.predict_ahead(hidden, targets, **options)
        losses += [loss(depth, state) for depth, state in enumerate(states, start=1)]
        return Output(None, losses, routes + more)

    def embed(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """tokens [...] -> [..., D]; `dtype` is the activations' from here on, the weights' own when None."""
        embedded = self.embed_tokens(tokens)
        return embedded if dtype is None else embedded.to(dtype)

    def hidden(
        self,
        tokens: Tensor,
        *,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        replay: Mapping[int, Tensor] | None = None,
        lengths: Lengths | None = None,
        stage: int = 0,
    ) -> tuple[Tensor, list[Route]]:
        """Whole sequences from position 0: tokens [B, T] -> (hidden [B, T, D] after the final norm, routes).

        A stage that is not the first takes hidden [B, T, D]; one that is not the last gives it before the norm.
        dtype: of the activations (BF16 compute over float32 weights). recompute: do not keep norms and MLA
        up-projections for backward. replay: per layer, the experts [N, K] to use instead of the gate's choice. lengths:
        of the samples packed into each row, which do not see each other; what is left of a row is padding.
        """
        layers, first, last = self.stages[stage]
        x = self.embed(tokens, dtype) if first else tokens
        cos, sin = self.rotary(positions(lengths, x))
        routes = []
        for layer in layers:
            x, route = self.layers[layer](x, cos, sin, recompute, (replay or {}).get(layer), lengths)
            if route is not None:
                routes.append(route)
        return self.norm(x) if last else x, routes

    def predict_ahead(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        recompute: bool = False,
        replay: Mapping[int, Tensor] | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[list[Tensor], list[Route]]:
        """MTP hidden states of depths 1 to D (eq. 21, 22), each [B, T, D] after its norm, and their routes.

        hidden [B, T, D] as `hidden` returns it; targets [B, T - 1 + D] or more: the tokens after the first.
        The head on depth k's state of token i predicts token i + k + 1 (eq. 23), targets[i + k]. The last k states of
        each of packed samples have no such token, and mean nothing.
        """
        length = hidden.shape[1]
        cos, sin = self.rotary(positions(lengths, hidden))
        states, routes = [], []
        for depth, module in enumerate(self.mtp, start=1):
            after = within(lengths, targets[:, depth - 1 : depth - 1 + length], depth)
            embedded = self.embed(after, hidden.dtype)
            layer = self.config.num_hidden_layers + depth - 1
            hidden, route = module(embedded, hidden, cos, sin, recompute, (replay or {}).get(layer), lengths)
            states.append(hidden)
            if route is not None:
                routes.append(route)
        return states, routes

    def step(self, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        """New tokens of several sequences at once: tokens [N] -> hidden [N, D] after the final norm.

        cache [num_hidden_layers (+ D), slots, cache_width] is read and written in place; MTP modules use the layers
        after the main model's.
        """
        for state, _ in self.step_states(tokens, cache, index):
            last = state
        return self.norm(last)

    def step_states(
        self, tokens: Tensor, cache: Tensor, index: ops.CacheIndex
    ) -> Iterator[tuple[Tensor, Route | None]]:
        """The parts of `step`: what the first layer begins with, then what each ends with, [N, D], and its route."""
        x = self.embed(tokens)
        yield x, None
        cos, sin = self.rotary(index.positions)
        for block, layer_cache in zip(self.layers, cache, strict=False):
            x, route = cast(Block, block).step(x, cos, sin, layer_cache, index)
            yield x, route

    def step_ahead(self, depth: int, hidden: Tensor, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        """MTP module `depth` (from 1) in serving: hidden [N, D] of depth - 1, the tokens [N] after them -> [N, D]."""
        cos, sin = self.rotary(index.positions)
        layer_cache = cache[self.config.num_hidden_layers + depth - 1]
        module = cast(MTPModule, self.mtp[depth - 1])
        return module.step(self.embed(tokens), hidden, cos, sin, layer_cache, index)
