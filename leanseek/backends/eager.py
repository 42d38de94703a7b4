"""The torch model, op by op: every network, device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from leanseek import ops
from leanseek.backends.protocol import Trace
from leanseek.model import Transformer


class TorchBackend:
    """As StepBackend. `head`, where given, is multiplied instead of the model's own."""

    def __init__(self, model: Transformer, head: ops.StoredWeight | None = None):
        self.config = model.config
        embedding = model.embed_tokens.weight
        self.device, self.dtype = embedding.device, embedding.dtype
        self._model = model
        self._head = model.head_weight if head is None else head

    def step(self, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        with ops.row_invariant(), torch.inference_mode():
            return self._model.step(tokens, cache, index)

    def step_ahead(self, depth: int, hidden: Tensor, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Tensor:
        with ops.row_invariant(), torch.inference_mode():
            return self._model.step_ahead(depth, hidden, tokens, cache, index)

    def trace(self, tokens: Tensor, cache: Tensor, index: ops.CacheIndex) -> Trace:
        with ops.row_invariant(), torch.no_grad():
            steps = list(self._model.step_states(tokens, cache, index))
            hidden = self._model.norm(steps[-1][0])
        none = tokens.new_zeros(len(tokens), self.config.num_experts_per_tok)
        routes = torch.stack([none if route is None else route.indices for _, route in steps[1:]])
        return Trace(torch.stack([x for x, _ in steps]), routes, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        with ops.row_invariant(), torch.inference_mode():
            return ops.linear(hidden, self._head).float()
