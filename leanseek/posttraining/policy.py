"""The network being trained, as the engine runs it: the same weights, in the order and dtype of a step backend."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from leanseek import ops
from leanseek.backends import PanelBackend, StepBackend, TorchBackend, refusal
from leanseek.backends.protocol import Trace
from leanseek.fp8 import modules as fp8
from leanseek.model import Transformer
from leanseek.model.layers import Linear
from leanseek.model.moe import Experts
from leanseek.ops.quantize import quantize_blocks
from leanseek.ops.weights import named_weights, replace_weight
from leanseek.posttraining.states import Recorder, Tree

EXACT = ("gate.weight", "e_score_correction_bias")  # float32 in training whatever the activations are


class Policy:
    """A model's weights as a `StepBackend`, made anew when they have changed.

    dtype: of activations, and of what is not quantised. precision: as `train.precision`; with "fp8" what trains in FP8
    is quantised in 128×128 blocks. room: bytes for what rollouts went through (states.py).
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, precision: str = "bf16", room: int = 0):
        self.model, self.dtype, self.precision, self.room = model, dtype, precision, room
        self._version: tuple[int, ...] = ()
        self._backend: StepBackend | None = None
        self._recorder: Recorder | None = None

    @property
    def version(self) -> tuple[int, ...]:
        """Changes whenever a weight does: torch counts the writes into each tensor. Nobody has to remember to tell."""
        return tuple(t._version for t in (*self.model.parameters(), *self.model.buffers()))

    def backend(self) -> StepBackend:
        """Of the weights as they are now; the same object for as long as they stay."""
        version = self.version
        if self._backend is None or version != self._version:
            self._backend, self._version = backend_of(self.model, self.dtype, self.precision), version
            self._recorder = None
        return self._backend

    def recorder(self) -> Recorder:
        """`backend`, keeping what its steps go through for `recall`. An engine adopts it with an empty cache."""
        backend = self.backend()
        self._recorder = self._recorder or Recorder(backend, self.room)
        return self._recorder

    def recall(self, rows: Tree) -> Trace | None:
        """What these rows went through under the weights as they are now, if a recorder has kept that."""
        self.backend()
        return self._recorder.recall(rows) if self._recorder else None

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def frozen(self) -> Policy:
        """The policy as it is now, apart from what training does to it: a reference."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return Policy(model, self.dtype, self.precision)


def backend_of(model: Transformer, dtype: torch.dtype, precision: str = "bf16") -> StepBackend:
    """A step backend of a model's weights in `dtype`, until the model changes: some tensors may be shared."""
    narrow = model if dtype == torch.float32 and precision == "bf16" else _narrowed(model, dtype, precision)
    weights = named_weights(narrow)
    return TorchBackend(narrow) if refusal(model.config, weights) else PanelBackend(model.config, weights)


@torch.no_grad()
def _narrowed(model: Transformer, dtype: torch.dtype, precision: str) -> Transformer:
    """A copy in `dtype`, with FP8 blocks where the original trains in FP8."""
    quantised = {n for n, m in model.named_modules() if isinstance(m, fp8.Linear | fp8.Experts)}
    found = Transformer(model.config, device="meta")
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        holder = found.get_submodule(module)
        if module in quantised and isinstance(holder, Linear | Experts):
            replace_weight(holder, leaf, _blocks(tensor))
            continue
        kept = tensor.detach() if name.endswith(EXACT) else tensor.detach().to(dtype)
        if leaf in holder._buffers:
            holder._buffers[leaf] = kept
        else:
            setattr(holder, leaf, torch.nn.Parameter(kept, requires_grad=False))
    found.rotary = copy.deepcopy(model.rotary)
    return found


def _blocks(weight: Tensor) -> ops.QuantizedWeight:
    parts = [quantize_blocks(part) for part in weight.float().reshape(-1, *weight.shape[-2:])]
    codes, scales = (torch.stack(both) for both in zip(*parts, strict=True))
    return ops.QuantizedWeight(
        codes.view(weight.shape), scales.view(ops.FP8_BLOCKS.scale_shape(weight.shape)), ops.FP8_BLOCKS
    )
