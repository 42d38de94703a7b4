"""The one place that chooses a backend: packed panels where kernels take all of a network, else the torch model."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import torch

from leanseek import checkpoint, ops
from leanseek.backends.eager import TorchBackend
from leanseek.backends.packed_copy import PackedCopy
from leanseek.backends.panels import HEAD, PanelBackend, refusal
from leanseek.backends.protocol import StepBackend
from leanseek.machine.numa import memory_nodes
from leanseek.model import Transformer
from leanseek.native import panels
from leanseek.native.panels import Place
from leanseek.ops.weights import named_weights, replace_weight

log = logging.getLogger(__name__)


def backend_of(model: Transformer) -> StepBackend:
    """For a model in memory, which stays as it is and must not change any more. Panels are copies of its weights."""
    weights = named_weights(model)
    if reason := refusal(model.config, weights):
        log.info("op by op: %s", reason)
        return TorchBackend(model)
    return PanelBackend(model.config, weights)


def open_backend(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
    *,
    int8_head: bool = False,
    packed_copy: bool = True,
    allow_links: bool = False,
) -> tuple[StepBackend, threading.Thread | None]:
    """For a checkpoint's folder; packed in the memory that its weights were read into.

    With dtype "auto" weights stay as they are stored, FP8 included. int8_head: the head in INT8_ROWS, whatever it is
    stored in. packed_copy: map the panels' file beside the checkpoint; where there is none, one is written by the
    thread that is returned.

    Raises:
        CheckpointError: as `checkpoint.load`; or it is a reward model.
    """
    if checkpoint.read_config(folder).num_labels:
        raise checkpoint.CheckpointError(
            f"{folder} is a reward model: its score.weight, in place of an output head, scores texts and writes none; "
            '[[rewards]] takes it by function = "model"'
        )
    # a mapped file's pages are not interleaved over memory nodes
    packed_copy = packed_copy and device.type == "cpu" and not panels.refusal() and len(memory_nodes()) < 2
    copy = PackedCopy(folder, str(dtype).removeprefix("torch."), int8_head) if packed_copy else None
    if copy and (found := copy.read()):
        return PanelBackend(*found, Place.THERE), None
    model = checkpoint.load(folder, device, dtype, keep_fp8=dtype == "auto", allow_links=allow_links)
    model.requires_grad_(False)
    config, head = model.config, _quantized_head(model) if int8_head else None
    weights = named_weights(model) | ({} if head is None else {HEAD: head})
    if reason := refusal(config, weights):
        log.info("op by op: %s", reason)
        return TorchBackend(model, head), None
    del model, head
    packed = dict(weights) if copy else {}
    return PanelBackend(config, weights, Place.WITHIN), copy.save(packed) if copy else None


def _quantized_head(model: Transformer) -> ops.QuantizedWeight:
    """The head in 8 bits; a head of its own gives its memory back."""
    head = ops.quantize_rows(ops.dense(model.head_weight, model.embed_tokens.weight.dtype))
    if model.lm_head is not None:
        replace_weight(model.lm_head, "weight", head)
    return head
