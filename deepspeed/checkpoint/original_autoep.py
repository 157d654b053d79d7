"""Weights of checkpoints that the original's AutoEP wrote, under the names that the plain Hugging Face model has.

Used by `original_experts` and `original`. By the files of version 0.19.8 at ZeRO stages 0 to 2, whose model file describes the layers:

    layer_{L}_expert_{E}_mp_rank_00_model_states.pt    {block}.experts.w1.E [inner, width], w3 alike, w2 [width, inner]
    model file                                         {block}.router.gate.*, and once more as {block}.{child}.gate.*

`child` is what the plain block calls its router. Its experts are gate_up_proj [experts, 2 * inner, width], w1 above w3, and down_proj.

Source: the files themselves, looked at as data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.utils.errors import CheckpointError

LAYERS = "ds_autoep_layers"
"""The model file's key with the description of such layers."""


def fused_experts(folder: Path, model: Mapping[str, Any], read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """Matrices of all experts of all layers, by their names in the plain model. Raises CheckpointError for a missing file."""
    found: dict[str, Tensor] = {}
    for layer in model[LAYERS]:
        prefix, of_experts = layer["expert_key_prefix"], []
        for expert in range(layer["num_experts"]):
            path = folder / f"layer_{layer['moe_layer_id']}_expert_{expert}_mp_rank_00_model_states.pt"
            if not path.exists():
                raise CheckpointError(
                    f"{path} is missing: expert {expert} of {prefix}, of a checkpoint of the original's AutoEP.\n"
                    "  Copy the checkpoint's folder whole; one of ZeRO stage 3 has no such files, and cannot be imported."
                )
            values = read(path)
            of_experts.append([values[f"{prefix}.{name}.{expert}"] for name in ("w1", "w3", "w2")])
        found[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in of_experts])
        found[f"{prefix}.down_proj"] = torch.stack([down for _, _, down in of_experts])
    return found


def plain_names(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model file's module without what AutoEP added, routers under their names in the plain model."""
    module = dict(model["module"])
    for block in (layer["module_path"] for layer in model[LAYERS]):
        added = f"{block}.router."
        routers = {name: module.pop(name) for name in list(module) if name.startswith(added)}
        module.pop(f"{block}.tokens_per_expert", None)
        for name, value in routers.items():
            rest = name.removeprefix(added)
            again = [other for other in module if other.startswith(f"{block}.") and other.endswith(f".{rest}")]
            child = again[0].removeprefix(f"{block}.").removesuffix(f".{rest}") if again else "gate"
            module.pop(f"{block}.{child}.{rest}", None)
            module[f"{block}.{child}.{rest.removeprefix('gate.')}"] = value
    return module
