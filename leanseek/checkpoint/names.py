"""Maps names on disk to names in memory and back, with one table.

On disk, as DeepSeek publishes: each expert's matrices are separate, and MTP modules are layers after the last one. In
memory: experts are stacked, so that they run as one grouped product, and MTP modules are under `mtp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from leanseek.model import Transformer


class Part(NamedTuple):
    """A tensor on disk, which is `ours[place]` of one of our tensors."""

    name: str
    place: tuple[int | slice, ...]


SCALE = "_scale_inv"  # X.weight has its scales in X.weight_scale_inv; here they are X.weight.data and X.weight.scale
STACKED = re.compile(rf"(.*\.experts)\.(gate_up_proj|down_proj)((?:{SCALE})?)")
_MTP = re.compile(r"mtp\.(\d+)\.(?:(block)\.|(norm)\.)?(.*)")


def hf_parts(name: str, tensor: Tensor, num_hidden_layers: int) -> list[Part]:
    """The published tensors that make up our state-dict entry `name`; `tensor` (meta is fine) gives its shape."""
    path = _hf_path(name, num_hidden_layers)
    stacked = STACKED.fullmatch(path)
    if stacked is None:
        return [Part(path, ())]
    base, kind, scale = stacked.groups()
    if kind == "down_proj":
        return [Part(f"{base}.{e}.down_proj.weight{scale}", (e,)) for e in range(tensor.shape[0])]
    half = tensor.shape[1] // 2  # gate rows first, then up
    return [
        Part(f"{base}.{e}.{matrix}.weight{scale}", (e, rows))
        for e in range(tensor.shape[0])
        for matrix, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, None)))
    ]


def _hf_path(name: str, num_hidden_layers: int) -> str:
    name = f"{name.removesuffix('.scale')}{SCALE}" if name.endswith(".scale") else name.removesuffix(".data")
    if mtp := _MTP.fullmatch(name):
        depth, _, norm, rest = mtp.groups()
        return f"model.layers.{num_hidden_layers + int(depth)}.{'shared_head.norm.' if norm else ''}{rest}"
    return name if name.startswith(("lm_head.", "score.")) else f"model.{name}"


def iter_hf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model exactly once, under its published name, as views: nothing is copied.

    Weights kept in FP8 come with their `weight_scale_inv`. Published MTP layers contain copies of embedding and head;
    we leave these out.
    """
    for name, tensor in model.state_dict().items():
        for part in hf_parts(name, tensor, model.config.num_hidden_layers):
            yield part.name, tensor[part.place]


def is_quantized(name: str) -> bool:
    """Whether published FP8 checkpoints store this weight as FP8 blocks (3.3): the linears of attention and experts.

    Embedding, head, norms, gate and `eh_proj` stay in BF16, `e_score_correction_bias` in FP32.
    """
    return re.fullmatch(r".*\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight", name) is not None
