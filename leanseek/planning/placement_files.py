"""Placements as the files that inference engines read, and the options they are started with.

SGLang: `--init-expert-location FILE.json`; the object's keys become arguments, so `physical_to_logical_map` must be its
only one, with a row for every layer of the main model, dense ones too (python/sglang/srt/eplb/expert_location.py).

vLLM: released versions take a number of redundant experts and place them themselves from the load they see
(`EPLBConfig`, vllm/config/parallel.py). The file is the list of lists of vLLM#49572, which is open: MoE layers only.

vLLM on Ascend: `eplb_config.expert_map_path` of `--additional-config`, in the form of its `export_tensor_to_file`
(vllm_ascend/eplb): MoE layers numbered from 0, experts by device.
"""

from __future__ import annotations

import json
from typing import Any

from leanseek.planning.placement import round_robin

FORMATS = ("sglang", "vllm", "vllm-ascend")


def placement_file(format: str, placement: dict[int, list[int]], layers: int, experts: int, gpus: int) -> Any:
    """The content of the file, for JSON.

    Args:
        format: one of `FORMATS`.
        placement: the expert in each slot, by number of layer; MoE layers only.
        layers: layers of the main model; later ones (MTP) are left out, engines place those themselves.
    """
    main = {layer: slots for layer, slots in sorted(placement.items()) if layer < layers}
    if format == "vllm":
        return list(main.values())
    if format == "vllm-ascend":
        size = len(next(iter(main.values()), [])) // gpus
        return {
            "moe_layer_count": len(main),
            "layer_list": [
                {
                    "layer_id": number,
                    "device_count": gpus,
                    "device_list": [
                        {"device_id": gpu, "device_expert": slots[gpu * size : (gpu + 1) * size]} for gpu in range(gpus)
                    ],
                }
                for number, slots in enumerate(main.values())
            ],
        }
    replicas = len(next(iter(main.values()), []))
    [dense] = round_robin(1, experts, replicas)
    return {"physical_to_logical_map": [main.get(layer, dense) for layer in range(layers)]}


def serving_options(format: str, path: str, redundant: int, gpus: int) -> str:
    """The options that start an engine with this file."""
    if format == "sglang":
        return f"--ep-size {gpus} --ep-num-redundant-experts {redundant} --init-expert-location {path}"
    if format == "vllm":
        config = json.dumps({"num_redundant_experts": redundant})
        return f"--enable-expert-parallel --enable-eplb --eplb-config '{config}'"
    config = json.dumps({"eplb_config": {"expert_map_path": path}})
    return f"--enable-expert-parallel --additional-config '{config}'"
